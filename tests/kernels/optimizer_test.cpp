// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>

#include "capstan/base/philox.h"
#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

constexpr auto k32 = DType::kFp32, k16 = DType::kBf16, k64 = DType::kFp64;

// Plain bytes in device memory.
template <class T>
Memory to_device(const std::vector<T>& values) {
  Memory memory(values.size() * sizeof(T));
  memory.write(values.data(), values.size() * sizeof(T));
  return memory;
}
template <class T>
T from_device(const Memory& memory) {
  T value;
  memory.read(&value, sizeof(T));
  return value;
}

enum class Rule { kAdamW, kLion, kSophia };
const char* name_of(Rule rule) {
  return rule == Rule::kAdamW ? "AdamW " : rule == Rule::kLion ? "Lion " : "Sophia ";
}
Launcher<OptimizerArgs> launcher_of(Rule rule) {
  return rule == Rule::kAdamW ? api().adamw : rule == Rule::kLion ? api().lion : api().sophia;
}

struct Case {
  OptimizerTypes types;
  size_t count;
  std::vector<FlatRange> ranges;
  Rule rule = Rule::kAdamW;
  size_t shift = 0;
};

// Of the element with which the buffer begins; indices of a case pass 2^32.
constexpr uint64_t kFirstIndex = 0xfffffe00;

struct Numbers {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, decay = 0.1, lr = 1e-2, scale = 0.5, rho = 0.7;
  int64_t count = 3;
};

struct Reference {
  Values weights, first, second;
};
void update(const Case& c, const Numbers& n, Reference& r, const Values& gradient,
            const FlatRange& range) {
  const double t = static_cast<double>(n.count);
  for (auto i = static_cast<size_t>(range.begin); i < static_cast<size_t>(range.end); ++i) {
    const double g = gradient[i] * n.scale;
    if ((range.flags & kDecay) != 0) r.weights[i] *= 1 - n.lr * n.decay;
    if (c.rule == Rule::kLion) {
      const double u = n.beta1 * r.first[i] + (1 - n.beta1) * g;
      r.weights[i] -= n.lr * (u > 0 ? 1 : u < 0 ? -1 : 0);
      r.first[i] = n.beta2 * r.first[i] + (1 - n.beta2) * g;
      continue;
    }
    r.first[i] = n.beta1 * r.first[i] + (1 - n.beta1) * g;
    if (c.rule == Rule::kSophia) {
      const double quotient = r.first[i] / (n.rho * r.second[i] + 1e-15);
      r.weights[i] -= n.lr * std::clamp(quotient, -1.0, 1.0);
      continue;
    }
    r.second[i] = n.beta2 * r.second[i] + (1 - n.beta2) * g * g;
    r.weights[i] -= n.lr / (1 - std::pow(n.beta1, t)) * r.first[i] /
                    (std::sqrt(r.second[i] / (1 - std::pow(n.beta2, t))) + n.eps);
  }
}

struct Inputs {
  Array weights, gradient, first, second;
  explicit Inputs(const Case& c)
      : weights(c.types.weights, random_values(c.count, 1), c.shift),
        gradient(c.types.gradient, random_values(c.count, 2), c.shift),
        first(c.types.moments, random_values(c.count, 3), c.shift),
        second(c.types.moments, squares(random_values(c.count, 4)), c.shift) {}
  static Values squares(Values values) {
    for (double& x : values) x *= x;
    return values;
  }
};

// weights, first, second, copy
std::vector<Array> run(const Case& c, const Numbers& n, const Inputs& in, const StepState& state) {
  std::vector<Array> out;
  out.emplace_back(c.types.weights, in.weights.values(), c.shift);
  out.emplace_back(c.types.moments, in.first.values(), c.shift);
  out.emplace_back(c.types.moments, in.second.values(), c.shift);
  out.push_back(Array::of_size(k16, c.count, c.shift));
  std::vector<FlatRange> ranges = c.ranges;
  for (FlatRange& range : ranges) range.index = kFirstIndex + static_cast<uint64_t>(range.begin);
  const auto tiles = cut_tiles(ranges);
  const Memory device_tiles = to_device(tiles), device_state = to_device<StepState>({state});
  const OptimizerArgs args{.types = c.types,
                           .beta1 = n.beta1,
                           .beta2 = n.beta2,
                           .eps = n.eps,
                           .weight_decay = n.decay,
                           .rho = n.rho,
                           .seed = 11,
                           .state = static_cast<const StepState*>(device_state.data()),
                           .tiles = static_cast<const Tile*>(device_tiles.data()),
                           .tile_count = static_cast<int64_t>(tiles.size()),
                           .weights = out[0].data(),
                           .gradient = in.gradient.data(),
                           .first = out[1].data(),
                           .second = c.rule == Rule::kLion ? nullptr : out[2].data(),
                           .copy = c.types.weights == k32 ? out[3].data() : nullptr};
  launcher_of(c.rule)(args, nullptr);
  return out;
}

bool is_in(const Case& c, size_t i) {
  for (const FlatRange& r : c.ranges)
    if (static_cast<int64_t>(i) >= r.begin && static_cast<int64_t>(i) < r.end) return true;
  return false;
}

// Stochastic rounding, one element at a time.
double rounded(double exact, uint32_t random) {
  const auto x = static_cast<float>(exact);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + (random & 0xffffu)) & 0xffff0000u;
  float result;
  std::memcpy(&result, &bits, sizeof bits);
  return result;
}

void check_moment(const Case& c, const Numbers& n, const Values& actual, const Values& exact,
                  size_t word, const char* what) {
  if (c.types.moments != k16) return expect_close(actual, exact, c.types.weights, what);
  size_t different = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!is_in(c, i)) continue;
    const auto random = philox::draw(11, static_cast<uint64_t>(n.count), kFirstIndex + i);
    different += actual[i] != rounded(exact[i], random[word]) ? 1 : 0;
    EXPECT_NEAR(actual[i], exact[i], std::fabs(exact[i]) / 120 + 1e-9) << what << " " << i;
  }
  // The sums before rounding differ in their last bit between fp32 and fp64 here and there.
  EXPECT_LE(different, actual.size() / 100 + 1) << what;
}

void check_case(const Case& c) {
  SCOPED_TRACE(testing::Message() << name_of(c.rule) << c.count << ", gradient "
                                  << name_of(c.types.gradient) << ", moments "
                                  << name_of(c.types.moments) << ", shift " << c.shift);
  const Numbers n;
  const Inputs in(c);
  const StepState state{.lr = n.lr, .gradient_scale = n.scale, .count = n.count};
  const auto out = same_bits([&] { return run(c, n, in, state); });
  Reference r{in.weights.values(), in.first.values(), in.second.values()};
  for (const FlatRange& range : c.ranges) update(c, n, r, in.gradient.values(), range);
  expect_close(out[0].values(), r.weights, c.types.weights, "weights");
  check_moment(c, n, out[1].values(), r.first, 0, "first moment");
  if (c.rule == Rule::kAdamW) check_moment(c, n, out[2].values(), r.second, 1, "second moment");
  if (c.rule == Rule::kSophia) EXPECT_EQ(out[2].bytes(), in.second.bytes());
  if (c.types.weights != k32) return;
  const Values copy = out[3].values(), expected = Array(k16, out[0].values()).values();
  for (size_t i = 0; i < c.count; ++i) {
    if (!is_in(c, i)) continue;
    EXPECT_EQ(copy[i], expected[i]) << "copy " << i;
  }
}

class FlatOptimizer : public KernelTest {};
TEST_F(FlatOptimizer, AllDtypes_MatchReference) {
  const std::vector<FlatRange> two = {{0, 700, kDecay}, {703, 1000, 0}};
  const std::vector<Case> cases = {
      {{k32, k32, k32}, 1000, two},
      {{k32, k16, k32}, 1000, two},
      {{k32, k32, k16}, 1000, two},
      {{k32, k16, k16}, 1001, two},
      {{k64, k64, k64}, 1000, two},
      {{k32, k32, k32}, 1, {{0, 1, kDecay}}},
      {{k32, k32, k32}, 1000, two, Rule::kAdamW, 1},
      {{k32, k32, k32}, 9000, {{0, 5000, 0}, {5000, 9000, kDecay}}},
      {{k32, k32, k32}, 16, {}},
  };
  for (Case c : cases)
    for (const Rule rule : {Rule::kAdamW, Rule::kLion, Rule::kSophia}) {
      c.rule = rule;
      check_case(c);
    }
}

// The arithmetic of src/optim/cpu/loops.inc, operation by operation in fp32.
TEST_F(FlatOptimizer, Fp32AdamW_HasTheBitsOfTheCpu) {
  const Case c{{k32, k32, k32}, 2000, {{0, 2000, kDecay}}};
  const Numbers n;
  const Inputs in(c);
  const auto out = run(c, n, in, {.lr = n.lr, .gradient_scale = n.scale, .count = n.count});
  const auto f = [](double x) { return static_cast<float>(x); };
  const double bias1 = 1 - std::pow(n.beta1, 3.0), bias2 = 1 - std::pow(n.beta2, 3.0);
  const float decay = f(1 - n.lr * n.decay), step = f(n.lr / bias1), root = f(1 / std::sqrt(bias2));
  Values weights = in.weights.values(), first = in.first.values(), second = in.second.values();
  const Values gradient = in.gradient.values();
  for (size_t i = 0; i < c.count; ++i) {
    const float g = f(gradient[i]) * f(n.scale);
    const float m = f(first[i]) * f(n.beta1) + g * f(1 - n.beta1);
    const float v = f(second[i]) * f(n.beta2) + (g * g) * f(1 - n.beta2);
    weights[i] = f(weights[i]) * decay - step * (m / (std::sqrt(v) * root + f(n.eps)));
    first[i] = m;
    second[i] = v;
  }
  EXPECT_EQ(out[0].values(), weights);
  EXPECT_EQ(out[1].values(), first);
  EXPECT_EQ(out[2].values(), second);
}

TEST_F(FlatOptimizer, SkippedStep_ChangesNothing) {
  const Case c{{k32, k32, k32}, 100, {{0, 100, kDecay}}};
  const Inputs in(c);
  const auto out = run(c, {}, in, {.lr = 1, .gradient_scale = NAN, .count = 1, .skip = 1});
  EXPECT_EQ(out[0].bytes(), in.weights.bytes());
  EXPECT_EQ(out[1].bytes(), in.first.bytes());
  EXPECT_EQ(out[2].bytes(), in.second.bytes());
}

TEST_F(FlatOptimizer, StochasticRounding_IsRightOnAverage) {
  // 1 + 1/512 lies a quarter of the way from 1 to the next bf16 number.
  Case c{{k32, k32, k16}, 4096, {{0, 4096, 0}}};
  const Array weights(k32, Values(4096, 0.0));
  const auto tiles = cut_tiles(c.ranges);
  const Memory device_tiles = to_device(tiles);
  const Memory state = to_device<StepState>({{.lr = 0, .gradient_scale = 1, .count = 1}});
  const Array gradient(k32, Values(4096, 1.0 + 1.0 / 512)), first(k16, Values(4096, 0.0));
  api().lion({.types = c.types,
              .beta1 = 0,
              .beta2 = 0,
              .seed = 5,
              .state = static_cast<const StepState*>(state.data()),
              .tiles = static_cast<const Tile*>(device_tiles.data()),
              .tile_count = static_cast<int64_t>(tiles.size()),
              .weights = weights.data(),
              .gradient = gradient.data(),
              .first = first.data()},
             nullptr);
  double mean = 0;
  for (const double x : first.values()) mean += x / 4096;
  EXPECT_NEAR(mean, 1.0 + 1.0 / 512, 3 * (1.0 / 128) * std::sqrt(3.0 / 16 / 4096));
}

TEST_F(FlatOptimizer, Tiles_CoverRangesWithoutOverlap) {
  const auto tiles = cut_tiles(std::vector<FlatRange>{{5, 9000, kDecay}, {9000, 9001, 0}});
  int64_t at = 5;
  for (const Tile& tile : tiles) {
    EXPECT_EQ(tile.begin, at);
    EXPECT_TRUE(at == 5 || at == 9000 || at % kTileElements == 0);
    at += tile.count;
  }
  EXPECT_EQ(at, 9001);
  EXPECT_EQ(tiles.back().flags, 0);
}

struct Norm {
  double sum;
  int32_t non_finite;
};
Norm norm_of(DType dtype, const std::vector<Values>& buffers,
             const std::vector<FlatRange>& ranges) {
  const Memory sum = to_device<double>({-1.0}), broken = to_device<int32_t>({-1});
  const auto tiles = cut_tiles(ranges);
  const Memory device_tiles = to_device(tiles), partial(tiles.size() * sizeof(double));
  bool add = false;
  for (const Values& values : buffers) {
    const Array x(dtype, values);
    api().squared_norm({.dtype = dtype,
                        .values = x.data(),
                        .tiles = static_cast<const Tile*>(device_tiles.data()),
                        .tile_count = static_cast<int64_t>(tiles.size()),
                        .partial = static_cast<double*>(partial.data()),
                        .sum = static_cast<double*>(sum.data()),
                        .non_finite = static_cast<int32_t*>(broken.data()),
                        .add = add},
                       nullptr);
    add = true;
  }
  return {from_device<double>(sum), from_device<int32_t>(broken)};
}

class GradientNorm : public KernelTest {};
TEST_F(GradientNorm, CountedTiles_SumInFp64) {
  const std::vector<FlatRange> ranges = {
      {0, 5001, kCounted}, {5003, 9000, 0}, {9000, 9999, kCounted}};
  for (const DType dtype : {k32, k16, k64}) {
    const Values x = Array(dtype, random_values(10000, 1)).values();
    double expected = 0;
    for (const FlatRange& r : ranges)
      for (auto i = static_cast<size_t>(r.begin); i < static_cast<size_t>(r.end); ++i)
        if ((r.flags & kCounted) != 0) expected += x[i] * x[i];
    const Norm one = norm_of(dtype, {x}, ranges), two = norm_of(dtype, {x, x}, ranges);
    EXPECT_NEAR(one.sum, expected, 1e-11 * expected);
    EXPECT_NEAR(two.sum, 2 * expected, 1e-11 * expected);
    EXPECT_EQ(one.non_finite, 0);
    begin_repeat(1);
    EXPECT_EQ(norm_of(dtype, {x}, ranges).sum, one.sum);
    begin_repeat(0);
  }
  EXPECT_EQ(norm_of(k32, {{}}, {}).sum, 0);
}

TEST_F(GradientNorm, NonFinite_IsFoundInTilesThatAreNotCounted) {
  Values x = random_values(6000, 1);
  const std::vector<FlatRange> ranges = {{0, 3000, kCounted}, {3000, 6000, 0}};
  x[5999] = NAN;
  EXPECT_EQ(norm_of(k32, {x}, ranges).non_finite, 1);
  EXPECT_EQ(norm_of(k32, {x, Values(6000, 1.0)}, ranges).non_finite, 1);
  x[5999] = INFINITY;
  EXPECT_EQ(norm_of(k16, {x}, ranges).non_finite, 1);
}

}  // namespace
}  // namespace capstan::kernels::test
