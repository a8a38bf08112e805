// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Sophia's curvature against scalar references.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "capstan/base/error.h"
#include "capstan/base/philox.h"
#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

constexpr auto k32 = DType::kFp32, k16 = DType::kBf16, k64 = DType::kFp64, k8 = DType::kUint8;
constexpr double kBeta2 = 0.9, kTokens = 12, kScale = 0.25;
constexpr int64_t kCount = 5;
constexpr uint64_t kSeed = 11, kFirstIndex = 0xfffffe00;  // indices pass 2^32

template <class T>
Memory to_device(const std::vector<T>& values) {
  Memory memory(values.size() * sizeof(T));
  memory.write(values.data(), values.size() * sizeof(T));
  return memory;
}
template <class T>
std::vector<T> from_device(const Memory& memory, size_t count) {
  std::vector<T> values(count);
  memory.read(values.data(), count * sizeof(T));
  return values;
}

void run(OptimizerTypes types, std::vector<FlatRange> ranges, const void* gradient, void* h,
         float* scale = nullptr) {
  for (FlatRange& range : ranges) range.index = kFirstIndex + static_cast<uint64_t>(range.begin);
  const auto tiles = cut_tiles(ranges);
  const Memory device_tiles = to_device(tiles), codes = to_device<MomentCodes>({kMomentCodes}),
               state = to_device<StepState>({{.count = kCount, .skip = 1}});
  api().sophia_curvature({.types = types,
                          .beta2 = kBeta2,
                          .tokens = kTokens,
                          .gradient_scale = kScale,
                          .seed = kSeed,
                          .state = static_cast<const StepState*>(state.data()),
                          .tiles = static_cast<const Tile*>(device_tiles.data()),
                          .tile_count = static_cast<int64_t>(tiles.size()),
                          .gradient = gradient,
                          .curvature = h,
                          .codes = static_cast<const MomentCodes*>(codes.data()),
                          .curvature_scale = scale},
                         nullptr);
}

// In fp32, operation by operation.
float estimated(float gradient, float h) {
  const auto f = [](double x) { return static_cast<float>(x); };
  const float g = gradient * f(kScale);
  const float made = (g * g) * f((1 - kBeta2) * kTokens) + h * f(kBeta2);
  return std::isfinite(made) ? made : h;
}

float rounded(float x, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + (random & 0xffffu)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

uint32_t random_of(size_t i) { return philox::draw(kSeed, kCount, kFirstIndex + i)[1]; }

Values squares(Values values) {
  for (double& x : values) x *= x;
  return values;
}
// Some that are not finite, or not when they are squared.
Values gradients(size_t count) {
  Values values = random_values(count, 2);
  values[1] = INFINITY;
  values[count / 2] = NAN;
  values[count - 1] = 1e30;
  return values;
}

class Curvature : public KernelTest {};

TEST_F(Curvature, HasTheBitsOfTheReference) {
  for (const OptimizerTypes types :
       {OptimizerTypes{k32, k32, k32}, {k32, k16, k32}, {k32, k32, k16}, {k32, k16, k16}})
    for (const size_t count : {size_t{3}, size_t{5001}}) {
      SCOPED_TRACE(testing::Message()
                   << name_of(types.gradient) << ", " << name_of(types.moments) << ", " << count);
      const Array gradient(types.gradient, gradients(count));
      const Array before(types.moments, squares(random_values(count, 4)));
      const auto last = static_cast<int64_t>(count);
      const auto out = same_bits([&] {
        std::vector<Array> made;
        made.emplace_back(types.moments, before.values());
        run(types, {{0, last / 3, kDecay}, {last / 3 + 1, last, 0}}, gradient.data(),
            made[0].data());
        return made;
      });
      const Values got = out[0].values(), h = before.values(), g = gradient.values();
      for (size_t i = 0; i < count; ++i) {
        float want = static_cast<float>(h[i]);
        if (i != count / 3) want = estimated(static_cast<float>(g[i]), want);
        if (types.moments == k16 && i != count / 3) want = rounded(want, random_of(i));
        ASSERT_EQ(got[i], want) << i;
      }
    }
}

TEST_F(Curvature, IsThatOfThePaperInFp64) {
  const Values g = random_values(1000, 2), h = squares(random_values(1000, 4));
  const Array gradient(k64, g), made(k64, h);
  run({k64, k64, k64}, {{0, 1000, 0}}, gradient.data(), made.data());
  const Values got = made.values();
  for (size_t i = 0; i < 1000; ++i)
    EXPECT_NEAR(got[i], kBeta2 * h[i] + (1 - kBeta2) * kTokens * g[i] * kScale * g[i] * kScale,
                1e-15 * (1 + got[i]));
}

// Of the two numbers of the code around x the one that the bits say, by looking at all of them.
uint8_t drawn(float x, uint32_t random) {
  const float* const number = kMomentCodes.second.number;
  int below = 0;
  while (below < 255 && number[below + 1] <= x) ++below;
  if (below == 255) return 255;
  const float gap = number[below + 1] - number[below];
  return static_cast<uint8_t>(
      below + (static_cast<float>(random >> 8) / 16777216.0F * gap < x - number[below] ? 1 : 0));
}

struct Blocks {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
};
Blocks make_blocks(size_t count) {
  Blocks blocks;
  for (size_t i = 0; i < count; ++i) blocks.bytes.push_back(static_cast<uint8_t>(i * 91));
  for (const double x : random_values(count / 256, 3))
    blocks.scales.push_back(static_cast<float>(std::fabs(x)));
  return blocks;
}
Blocks run(const Blocks& in, DType dtype, const Array& gradient,
           const std::vector<FlatRange>& ranges) {
  const Memory bytes = to_device(in.bytes), scales = to_device(in.scales);
  run({k32, dtype, k8}, ranges, gradient.data(), bytes.data(), static_cast<float*>(scales.data()));
  return {from_device<uint8_t>(bytes, in.bytes.size()),
          from_device<float>(scales, in.scales.size())};
}

TEST_F(Curvature, InBlocks_HasTheBitsOfTheReference) {
  for (const DType dtype : {k32, k16})
    for (const size_t count : {size_t{256}, size_t{4096 + 768}}) {
      const Blocks in = make_blocks(count);
      const Array gradient(dtype, gradients(count));
      const Values g = gradient.values();
      const Blocks out = run(in, dtype, gradient, {{0, static_cast<int64_t>(count), 0}});
      for (size_t b = 0; b < count / 256; ++b) {
        float h[256], largest = 0;
        for (size_t j = 0; j < 256; ++j) {
          const float before = kMomentCodes.second.number[in.bytes[b * 256 + j]] * in.scales[b];
          h[j] = estimated(static_cast<float>(g[b * 256 + j]), before);
          largest = std::max(largest, h[j]);
        }
        ASSERT_EQ(out.scales[b], largest) << b;
        for (size_t j = 0; j < 256; ++j)
          ASSERT_EQ(out.bytes[b * 256 + j], drawn(h[j] / largest, random_of(b * 256 + j)))
              << b << " " << j;
      }
    }
}

TEST_F(Curvature, InBlocks_OthersAndZerosStay) {
  Blocks in = make_blocks(1024);
  std::fill_n(in.bytes.begin() + 512, 256, uint8_t{0});
  in.scales[2] = 0;
  Values g = random_values(1024, 2);
  std::fill_n(g.begin() + 512, 256, 0.0);
  const Blocks out = run(in, k32, Array(k32, g), {{256, 768, 0}});
  for (size_t i = 0; i < 1024; ++i)
    if (i < 256 || i >= 512) ASSERT_EQ(out.bytes[i], in.bytes[i]) << i;
  EXPECT_EQ(out.scales[0], in.scales[0]);
  EXPECT_NE(out.scales[1], in.scales[1]);
  EXPECT_EQ(out.scales[2], 0);
  EXPECT_EQ(out.scales[3], in.scales[3]);
}

TEST_F(Curvature, OfOtherTypes_IsRefused) {
  const Array x(k64, Values(16, 1.0));
  EXPECT_THROW(run({k64, k64, k32}, {{0, 16, 0}}, x.data(), x.data()), InternalError);
  EXPECT_THROW(run({k32, k32, k8}, {{0, 256, 0}}, x.data(), x.data()), InternalError);
}

}  // namespace
}  // namespace capstan::kernels::test
