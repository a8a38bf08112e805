// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Format {
  int mantissa, bias;
  double largest;
};
Format format_of(Fp8 format) {
  return format == Fp8::kE4m3 ? Format{3, 7, 448} : Format{2, 15, 57344};
}

double decode(uint8_t bits, const Format& f) {
  const int exponent = (bits & 0x7f) >> f.mantissa, m = bits & ((1 << f.mantissa) - 1);
  const double size = exponent == 0
                          ? std::ldexp(m, 1 - f.bias - f.mantissa)
                          : std::ldexp((1 << f.mantissa) + m, exponent - f.bias - f.mantissa);
  return (bits & 0x80) != 0 ? -size : size;
}

// The nearest number of the format by looking at all of them; of two the one with an even pattern.
uint8_t nearest(double x, Fp8 format) {
  const Format f = format_of(format);
  if (std::isnan(x)) return 0x7f;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const double size = std::fmin(std::fabs(x), f.largest);
  uint8_t best = 0;
  for (int bits = 1; bits < 0x80 && decode(static_cast<uint8_t>(bits), f) <= f.largest; ++bits) {
    const double now = std::fabs(decode(static_cast<uint8_t>(bits), f) - size);
    const double before = std::fabs(decode(best, f) - size);
    if (now < before || (now == before && bits % 2 == 0)) best = static_cast<uint8_t>(bits);
  }
  return sign | best;
}

// What the kernel rounds: the product in fp32.
Values rounded(const Values& x, const std::vector<float>& scale_of_row, size_t columns,
               Fp8 format) {
  Values out(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    out[i] = nearest(static_cast<float>(x[i]) * scale_of_row[i / columns], format);
  return out;
}

Values transposed(const Values& x, size_t rows, size_t columns) {
  Values out(x.size());
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < columns; ++c) out[c * rows + r] = x[r * columns + c];
  return out;
}

double amax_of(const Values& x) {
  double top = 0;
  for (const double v : x) top = std::fmax(top, std::fabs(v));
  return top;
}

struct Case {
  DType dtype;
  Fp8 format;
  size_t rows, columns;
  size_t shift = 0;
};
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {DType::kBf16, Fp8::kE4m3, 64, 64},     {DType::kFp32, Fp8::kE5m2, 80, 72},
      {DType::kBf16, Fp8::kE5m2, 17, 131},    {DType::kFp32, Fp8::kE4m3, 1, 7},
      {DType::kBf16, Fp8::kE4m3, 130, 16, 1}, {DType::kBf16, Fp8::kE4m3, 0, 16},
      {DType::kBf16, Fp8::kE4m3, 3, 1040},
  };
  return all;
}

class CastFp8 : public KernelTest {};
TEST_F(CastFp8, CurrentScaling_RoundsToNearestInBothLayouts) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(testing::Message() << name_of(c.dtype) << " " << c.rows << " x " << c.columns);
    const size_t count = c.rows * c.columns;
    const Array x(c.dtype, random_values(count, 1, 0.01), c.shift);
    const auto out = same_bits([&] {
      std::vector<Array> y;
      y.push_back(Array::of_size(DType::kUint8, count));
      y.push_back(Array::of_size(DType::kUint8, count));
      for (int i = 0; i < 4; ++i) y.push_back(Array::zeros(DType::kFp32, 1));
      api().amax({c.dtype, x.data(), static_cast<int64_t>(count), y[2].as<float>()}, nullptr);
      api().fp8_scale({c.format, y[2].as<float>(), 1, false, y[3].as<float>(), y[4].as<float>()},
                      nullptr);
      api().cast_fp8({.dtype = c.dtype,
                      .format = c.format,
                      .rows = static_cast<int64_t>(c.rows),
                      .columns = static_cast<int64_t>(c.columns),
                      .x = x.data(),
                      .scale = y[3].as<float>(),
                      .out = y[0].as<uint8_t>(),
                      .transposed = y[1].as<uint8_t>(),
                      .amax = y[5].as<float>()},
                     nullptr);
      y.push_back(Array::of_size(DType::kUint8, count));
      api().cast_fp8({.dtype = c.dtype,
                      .format = c.format,
                      .rows = static_cast<int64_t>(c.rows),
                      .columns = static_cast<int64_t>(c.columns),
                      .x = x.data(),
                      .scale = y[3].as<float>(),
                      .transposed = y[6].as<uint8_t>()},
                     nullptr);
      return y;
    });
    const double top = amax_of(x.values());
    EXPECT_EQ(out[2].values()[0], top);
    EXPECT_EQ(out[5].values()[0], top);
    const auto scale = static_cast<float>(out[3].values()[0]);
    const float want =
        top > 0 ? static_cast<float>(format_of(c.format).largest) / static_cast<float>(top) : 1.0f;
    EXPECT_FLOAT_EQ(scale, want);
    EXPECT_FLOAT_EQ(static_cast<float>(out[4].values()[0]), 1 / want);
    const Values expected =
        rounded(x.values(), std::vector<float>(c.rows, scale), c.columns, c.format);
    EXPECT_EQ(out[0].values(), expected);
    EXPECT_EQ(out[1].values(), transposed(expected, c.rows, c.columns));
    EXPECT_EQ(out[6].bytes(), out[1].bytes());
  }
}

TEST_F(CastFp8, ScalePerRow_RoundsToNearest) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(testing::Message() << name_of(c.dtype) << " " << c.rows << " x " << c.columns);
    Values values = random_values(c.rows * c.columns, 1);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] *= std::exp2(static_cast<double>(i / c.columns % 9) - 4);
    for (size_t i = 0; c.rows > 2 && i < c.columns; ++i)
      values[c.columns + i] = 0;  // a row of zeros
    const Array x(c.dtype, values, c.shift);
    const auto out = same_bits([&] {
      std::vector<Array> y;
      y.push_back(Array::of_size(DType::kUint8, values.size()));
      y.push_back(Array::of_size(DType::kFp32, c.rows));
      api().cast_rows_fp8({.dtype = c.dtype,
                           .format = c.format,
                           .rows = static_cast<int64_t>(c.rows),
                           .columns = static_cast<int64_t>(c.columns),
                           .x = x.data(),
                           .out = y[0].as<uint8_t>(),
                           .inverse_scale = y[1].as<float>()},
                          nullptr);
      return y;
    });
    const Values rounded_x = x.values();
    std::vector<float> scales;
    Values inverse;
    for (size_t r = 0; r < c.rows; ++r) {
      const auto first = rounded_x.begin() + static_cast<std::ptrdiff_t>(r * c.columns);
      const double top = amax_of(Values(first, first + static_cast<std::ptrdiff_t>(c.columns)));
      scales.push_back(top > 0 ? static_cast<float>(format_of(c.format).largest) /
                                     static_cast<float>(top)
                               : 1.0f);
      inverse.push_back(1 / scales.back());
    }
    EXPECT_EQ(out[0].values(), rounded(rounded_x, scales, c.columns, c.format));
    expect_close(out[1].values(), inverse, Tolerance{1e-6, 0}, "inverse_scale");
  }
}

// Every kind of number: subnormal, half way, too large, NaN.
TEST_F(CastFp8, SpecialNumbers_RoundLikeTheTable) {
  Values x = {0.0,   -0.0,  NAN,   INFINITY,     -INFINITY, 1e30,
              -1e30, 464.0, 463.9, 0.0009765625, 0.0009766};
  for (int bits = 0; bits < 0x7e; ++bits) {  // each number, and half way to the next
    const Format f = format_of(Fp8::kE4m3);
    const double a = decode(static_cast<uint8_t>(bits), f),
                 b = decode(static_cast<uint8_t>(bits + 1), f);
    x.insert(x.end(), {a, -(a + b) / 2, (a + b) / 2 * 1.0001, (a + b) / 2 * 0.9999});
  }
  const Array in(DType::kFp32, x), scale(DType::kFp32, {1.0});
  for (const Fp8 format : {Fp8::kE4m3, Fp8::kE5m2}) {
    const Array out = Array::of_size(DType::kUint8, x.size());
    api().cast_fp8({.dtype = DType::kFp32,
                    .format = format,
                    .rows = 1,
                    .columns = static_cast<int64_t>(x.size()),
                    .x = in.data(),
                    .scale = scale.as<float>(),
                    .out = out.as<uint8_t>()},
                   nullptr);
    EXPECT_EQ(out.values(), rounded(in.values(), {1.0f}, x.size(), format));
  }
}

TEST_F(CastFp8, Scales_AreFiniteForEveryMaximum) {
  const Values tops = {0, 448, 1e-45, INFINITY, 3, 1e38};
  const Array amax(DType::kFp32, tops), scale = Array::of_size(DType::kFp32, 6),
                                        inverse = Array::of_size(DType::kFp32, 6);
  api().fp8_scale({Fp8::kE4m3, amax.as<float>(), 6, true, scale.as<float>(), inverse.as<float>()},
                  nullptr);
  const Values s = scale.values();
  EXPECT_EQ(s[0], 1);
  EXPECT_EQ(s[1], 1);
  EXPECT_EQ(s[2], std::exp2(127));
  EXPECT_EQ(s[3], 1);
  EXPECT_EQ(s[4], 128);
  for (const double x : s) EXPECT_TRUE(std::isfinite(x) && x > 0);
}

TEST_F(CastFp8, RunningMaximum_KeepsWhatWasLarger) {
  const Array x(DType::kBf16, {1.0, -2.0}), scale(DType::kFp32, {1.0}), amax(DType::kFp32, {5.0});
  const Array out = Array::of_size(DType::kUint8, 2);
  CastFp8Args args{.rows = 1,
                   .columns = 2,
                   .x = x.data(),
                   .scale = scale.as<float>(),
                   .out = out.as<uint8_t>(),
                   .amax = amax.as<float>()};
  api().cast_fp8(args, nullptr);
  EXPECT_EQ(amax.values()[0], 5);
  const Array larger(DType::kBf16, {1.0, -8.0});
  args.x = larger.data();
  api().cast_fp8(args, nullptr);
  EXPECT_EQ(amax.values()[0], 8);
}

}  // namespace
}  // namespace capstan::kernels::test
