// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/fp8.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "capstan/ops/path.h"
#include "support/gradient_check.h"
#include "unit/ops/fp8_reference.h"

namespace capstan::ops {
namespace {

using testing::book_format;
using testing::nearest;

constexpr Fp8Format kFormats[] = {Fp8Format::kE4m3, Fp8Format::kE5m2};

Tensor row_of(const std::vector<float>& x) {
  return at::tensor(x, at::kFloat).view({1, static_cast<int64_t>(x.size())});
}

// Patterns with scale 1.
std::vector<uint8_t> cast_unscaled(const std::vector<float>& x, Fp8Format format) {
  const Tensor largest = at::full({1}, largest_of(format), at::kFloat);
  const Fp8Matrix q = quantise(row_of(x), format, largest);
  EXPECT_EQ(q.values_MK.scalar_type(), scalar_type_of(format));
  EXPECT_EQ(q.inverse_scale.item<float>(), 1.0F);
  const Tensor bytes = q.values_MK.view(at::kByte).contiguous();
  const auto* const data = bytes.const_data_ptr<uint8_t>();
  return {data, data + bytes.numel()};
}

void expect_nearest(const std::vector<float>& x, Fp8Format format) {
  const std::vector<uint8_t> got = cast_unscaled(x, format);
  for (size_t i = 0; i < x.size(); ++i)
    ASSERT_EQ(static_cast<int>(got[i]), static_cast<int>(nearest(x[i], format)))
        << x[i] << " in " << c10::toString(scalar_type_of(format));
}

class EveryPath : public ::testing::TestWithParam<Path> {
 protected:
  PathGuard guard_{GetParam()};
};

TEST_P(EveryPath, AllPatterns_ComeBack) {
  for (const Fp8Format format : kFormats) {
    std::vector<float> x;
    std::vector<int> patterns;
    for (int bits = 0; bits < 256; ++bits) {
      const double value = testing::value_of(static_cast<uint8_t>(bits), format);
      if (std::fabs(value) > book_format(format).largest) continue;
      x.push_back(static_cast<float>(value));
      patterns.push_back(bits);
    }
    EXPECT_EQ(patterns.size(), format == Fp8Format::kE4m3 ? 254U : 248U);
    const std::vector<uint8_t> got = cast_unscaled(x, format);
    for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(static_cast<int>(got[i]), patterns[i]) << x[i];
  }
}

// Half way between two numbers, subnormals included, and a float's width beside it.
TEST_P(EveryPath, HalfWay_GoesToEven) {
  for (const Fp8Format format : kFormats) {
    std::vector<float> x;
    const auto f = book_format(format);
    for (int bits = 0; testing::decode(bits + 1, f) <= f.largest; ++bits) {
      const auto half =
          static_cast<float>((testing::decode(bits, f) + testing::decode(bits + 1, f)) / 2);
      for (const float v : {half, std::nextafter(half, 0.0F), std::nextafter(half, 1e9F)})
        x.insert(x.end(), {v, -v});
    }
    expect_nearest(x, format);
  }
}

TEST_P(EveryPath, LargeNumbersSaturate_NanStays) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (const Fp8Format format : kFormats) {
    const float top = largest_of(format);
    expect_nearest({top, -top, top * 1.0001F, top * 1.5F, -1e30F, inf, -inf, 3.4e38F, 0.0F, -0.0F,
                    1e-45F, -1e-45F, 1e-30F},
                   format);
    for (const uint8_t bits : cast_unscaled({nan, -nan}, format)) EXPECT_EQ(bits & 0x7f, 0x7f);
  }
}

INSTANTIATE_TEST_SUITE_P(Cast, EveryPath, ::testing::Values(Path::kFused, Path::kReference),
                         [](const auto& instance) {
                           return instance.param == Path::kFused ? "Loops" : "Reference";
                         });

// Any float, by its pattern: loops and ATen's cast agree on every bit (NaN: up to its sign).
TEST(Fp8, LoopsAreTheCastOfATen) {
  std::mt19937 random(7);
  std::vector<float> x(1 << 18);
  for (float& v : x) v = std::bit_cast<float>(static_cast<uint32_t>(random()));
  for (const Fp8Format format : kFormats) {
    const auto loops = cast_unscaled(x, format);
    const PathGuard guard(Path::kReference);
    const auto reference = cast_unscaled(x, format);
    for (size_t i = 0; i < x.size(); ++i)
      ASSERT_TRUE(loops[i] == reference[i] || (std::isnan(x[i]) && (reference[i] & 0x7f) == 0x7f))
          << x[i] << ": " << int{loops[i]} << " and " << int{reference[i]};
  }
}

TEST(Fp8, Scale_PutsTheMaximumAtTheLargestNumber) {
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const Fp8Format format : kFormats)
      for (const double size : {1e-20, 3e-3, 1.0, 7e12}) {
        const Tensor x = (testing::normal({64, 48}, 3) * size).to(type);
        const Tensor largest = largest_size(x);
        EXPECT_EQ(largest.item<float>(), x.abs().max().item<float>());
        const Fp8Matrix q = quantise(x, format, largest);
        EXPECT_EQ(q.values_MK.to(at::kFloat).abs().max().item<float>(), largest_of(format));
        const PathGuard guard(Path::kReference);
        const Fp8Matrix again = quantise(x, format, largest_size(x));
        EXPECT_TRUE(at::equal(q.values_MK.view(at::kByte), again.values_MK.view(at::kByte)));
        EXPECT_TRUE(at::equal(q.inverse_scale, again.inverse_scale));
      }
}

TEST(Fp8, Rows_HaveScalesOfTheirOwn) {
  Tensor x = testing::normal({9, 40}, 5);
  for (int64_t r = 0; r < 9; ++r) x[r].mul_(std::pow(10.0, static_cast<double>(r - 4)));
  x[3].zero_();
  x = x.to(at::kBFloat16);
  for (const Fp8Format format : kFormats) {
    const Fp8Matrix q = quantise_rows(x, format);
    ASSERT_EQ(q.inverse_scale.sizes(), at::IntArrayRef({9, 1}));
    const Tensor tops = q.values_MK.to(at::kFloat).abs().amax(1);
    for (int64_t r = 0; r < 9; ++r)
      EXPECT_EQ(tops[r].item<float>(), r == 3 ? 0 : largest_of(format)) << r;
    EXPECT_EQ(q.inverse_scale[3].item<float>(), 1.0F);
    const Tensor back = q.values_MK.to(at::kDouble) * q.inverse_scale.to(at::kDouble);
    EXPECT_TRUE(at::equal(back, testing::through_fp8(x, format, 0)));
    const PathGuard guard(Path::kReference);
    const Fp8Matrix again = quantise_rows(x, format);
    EXPECT_TRUE(at::equal(q.values_MK.view(at::kByte), again.values_MK.view(at::kByte)));
    EXPECT_TRUE(at::equal(q.inverse_scale, again.inverse_scale));
  }
}

TEST(Fp8, Maximum_LeavesNanOut_AndIsJoined) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  for (const Path path : {Path::kFused, Path::kReference}) {
    const PathGuard guard(path);
    EXPECT_EQ(largest_size(row_of({1, nan, -3, 2})).item<float>(), 3);
    EXPECT_EQ(largest_size(row_of({nan})).item<float>(), 0);
    const Tensor top = largest_size(row_of({1, -4}));
    raise_to_largest_size(top, row_of({-2}));
    EXPECT_EQ(top.item<float>(), 4);
    raise_to_largest_size(top, row_of({5}));
    EXPECT_EQ(top.item<float>(), 5);
    // An infinite maximum gives scale 1.
    const Fp8Matrix q = quantise(row_of({1, inf}), Fp8Format::kE4m3, at::full({1}, inf));
    EXPECT_EQ(q.inverse_scale.item<float>(), 1);
    EXPECT_EQ(q.values_MK.to(at::kFloat)[0][1].item<float>(), 448);
  }
}

TEST(Fp8, Transposed_IsTheSameCast) {
  const Tensor x = testing::normal({33, 20}, 2).to(at::kBFloat16), top = largest_size(x);
  for (const Path path : {Path::kFused, Path::kReference}) {
    const PathGuard guard(path);
    const Tensor observed = at::zeros({1}, at::kFloat);
    const Fp8Matrix a = quantise(x, Fp8Format::kE5m2, top);
    const Fp8Matrix b =
        quantise(x, Fp8Format::kE5m2, top, {.transposed = true, .observed = observed});
    EXPECT_TRUE(b.values_MK.is_contiguous());
    EXPECT_TRUE(at::equal(a.values_MK.view(at::kByte).t(), b.values_MK.view(at::kByte)));
    EXPECT_TRUE(at::equal(observed, top));
  }
}

// fp32 sums of exact products, scaled, rounded once: against fp64. More rows than the emulation
// multiplies at a time.
TEST(Fp8, Product_IsRoundedOnce) {
  const Tensor x = testing::normal({300, 64}, 1), w = testing::normal({48, 64}, 2) * 0.03;
  const Tensor a = x.to(at::kBFloat16), b = w.to(at::kBFloat16);
  for (const bool by_row : {false, true})
    for (const Fp8Format format : kFormats) {
      const auto cast = [&](const Tensor& m, Fp8Format f) {
        return by_row ? quantise_rows(m, f) : quantise(m, f, largest_size(m));
      };
      const Fp8Matrix qa = cast(a, format), qb = cast(b, Fp8Format::kE4m3);
      const auto wide = [](const Fp8Matrix& q) {
        return q.values_MK.to(at::kDouble) * q.inverse_scale.to(at::kDouble);
      };
      const Tensor expected = at::mm(wide(qa), wide(qb).t());
      const Tensor bound = at::mm(wide(qa).abs(), wide(qb).abs().t()) * (68 * std::exp2(-24));
      const Tensor exact = at::empty({300, 48}, at::kFloat);
      multiply_into(exact, qa, qb);
      EXPECT_TRUE(((exact.to(at::kDouble) - expected).abs() <= bound).all().item<bool>());
      const Tensor rounded = at::empty({300, 48}, at::kBFloat16);
      multiply_into(rounded, qa, qb);
      EXPECT_TRUE(at::equal(rounded, exact.to(at::kBFloat16)));
    }
}

}  // namespace
}  // namespace capstan::ops
