// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Optimizers on 8-bit moments against a scalar reference that looks at all numbers of the code.
#include <algorithm>
#include <cmath>

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

constexpr auto k32 = DType::kFp32, k16 = DType::kBf16;
constexpr double kBeta1 = 0.9, kBeta2 = 0.95, kEps = 1e-8, kWeightDecay = 0.1, kLr = 1e-2,
                 kScale = 0.5, kRho = 0.7;
constexpr int64_t kCount = 3;

enum class Rule { kAdamW, kLion, kSophia };
constexpr Rule kRules[] = {Rule::kAdamW, Rule::kLion, Rule::kSophia};
Launcher<BlockwiseArgs> launcher_of(Rule rule) {
  return rule == Rule::kAdamW  ? api().adamw_blockwise
         : rule == Rule::kLion ? api().lion_blockwise
                               : api().sophia_blockwise;
}

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

struct State {
  std::vector<float> weights;
  std::vector<uint8_t> first, second;
  std::vector<float> first_scale, second_scale;
  std::vector<float> copy;
};

State make_state(size_t elements) {
  State state;
  for (const double x : random_values(elements, 1)) state.weights.push_back(static_cast<float>(x));
  for (size_t i = 0; i < elements; ++i) {
    state.first.push_back(static_cast<uint8_t>(i * 37));
    state.second.push_back(static_cast<uint8_t>(i * 91 % 201));  // coded anew, it had another scale
  }
  for (const double x : random_values(elements / 256, 2))
    state.first_scale.push_back(static_cast<float>(std::fabs(x)));
  for (const double x : random_values(elements / 256, 3))
    state.second_scale.push_back(static_cast<float>(std::fabs(x)));
  return state;
}

State run(Rule rule, const State& in, const Array& gradient, DType dtype,
          const std::vector<FlatRange>& ranges, int32_t skip = 0) {
  const bool has_second = rule != Rule::kLion;
  const size_t n = in.weights.size(), blocks = n / 256;
  const auto tiles = cut_tiles(ranges);
  const Memory device_tiles = to_device(tiles), codes = to_device<MomentCodes>({kMomentCodes});
  const Memory step =
      to_device<StepState>({{.lr = kLr, .gradient_scale = kScale, .count = kCount, .skip = skip}});
  const Memory weights = to_device(in.weights), first = to_device(in.first),
               second = to_device(in.second), first_scale = to_device(in.first_scale),
               second_scale = to_device(in.second_scale);
  const Array copy = Array::of_size(k16, n);
  launcher_of(rule)(
      {.gradient = dtype,
       .beta1 = kBeta1,
       .beta2 = kBeta2,
       .eps = kEps,
       .weight_decay = kWeightDecay,
       .rho = kRho,
       .state = static_cast<const StepState*>(step.data()),
       .tiles = static_cast<const Tile*>(device_tiles.data()),
       .tile_count = static_cast<int64_t>(tiles.size()),
       .codes = static_cast<const MomentCodes*>(codes.data()),
       .weights = weights.data(),
       .gradient_values = gradient.data(),
       .first = static_cast<uint8_t*>(first.data()),
       .second = has_second ? static_cast<uint8_t*>(second.data()) : nullptr,
       .first_scale = static_cast<float*>(first_scale.data()),
       .second_scale = has_second ? static_cast<float*>(second_scale.data()) : nullptr,
       .copy = copy.data()},
      nullptr);
  State out{from_device<float>(weights, n),           from_device<uint8_t>(first, n),
            from_device<uint8_t>(second, n),          from_device<float>(first_scale, blocks),
            from_device<float>(second_scale, blocks), {}};
  for (const double x : copy.values()) out.copy.push_back(static_cast<float>(x));
  return out;
}

uint8_t nearest(float x, const DynamicCode& code, bool keeps_positive) {
  const auto number = [&](int place) {
    return static_cast<double>(code.number[static_cast<uint8_t>(place - code.zero)]);
  };
  int best = 0;
  for (int place = 1; place < 256; ++place)
    if (std::fabs(number(place) - x) < std::fabs(number(best) - x)) best = place;
  if (keeps_positive && best == code.zero) ++best;
  return static_cast<uint8_t>(best - code.zero);
}

struct Element {
  float weight, first, second;
};
// In fp32, operation by operation.
Element updated(Rule rule, Element x, float gradient, bool decays) {
  const auto f = [](double value) { return static_cast<float>(value); };
  const float g = gradient * f(kScale),
              decayed = x.weight * (decays ? f(1 - kLr * kWeightDecay) : 1.0F);
  if (rule == Rule::kLion) {
    const float u = x.first * f(kBeta1) + g * f(1 - kBeta1);
    const float sign = static_cast<float>(u > 0) - static_cast<float>(u < 0);
    return {decayed - f(kLr) * sign, x.first * f(kBeta2) + g * f(1 - kBeta2), x.second};
  }
  const float m = x.first * f(kBeta1) + g * f(1 - kBeta1);
  if (rule == Rule::kSophia) {
    const float quotient = m / (x.second * f(kRho) + f(1e-15));
    return {decayed - f(kLr) * std::clamp(quotient, -1.0F, 1.0F), m, x.second};
  }
  const double bias1 = 1 - std::pow(kBeta1, 3.0), bias2 = 1 - std::pow(kBeta2, 3.0);
  const float v = x.second * f(kBeta2) + (g * g) * f(1 - kBeta2);
  return {decayed - f(kLr / bias1) * (m / (std::sqrt(v) * f(1 / std::sqrt(bias2)) + f(kEps))), m,
          v};
}

State expected(Rule rule, const State& in, const Values& gradient, bool decays) {
  State out = in;
  out.copy.clear();
  for (size_t b = 0; b < in.first_scale.size(); ++b) {
    std::vector<Element> made(256);
    float m_scale = 0, v_scale = 0;
    for (size_t j = 0; j < 256; ++j) {
      const size_t i = b * 256 + j;
      const Element before{in.weights[i],
                           kMomentCodes.first.number[in.first[i]] * in.first_scale[b],
                           kMomentCodes.second.number[in.second[i]] * in.second_scale[b]};
      made[j] = updated(rule, before, static_cast<float>(gradient[i]), decays);
      out.weights[i] = made[j].weight;
      m_scale = std::max(m_scale, std::fabs(made[j].first));
      v_scale = std::max(v_scale, made[j].second);
    }
    out.first_scale[b] = m_scale;
    for (size_t j = 0; j < 256; ++j)
      out.first[b * 256 + j] = nearest(made[j].first / m_scale, kMomentCodes.first, false);
    if (rule != Rule::kAdamW) continue;
    out.second_scale[b] = v_scale;
    for (size_t j = 0; j < 256; ++j)
      out.second[b * 256 + j] =
          nearest(made[j].second / v_scale, kMomentCodes.second, made[j].second > 0);
  }
  return out;
}

class Blockwise : public KernelTest {};

TEST_F(Blockwise, HasTheBitsOfTheReference) {
  for (const Rule rule : kRules)
    for (const DType dtype : {k32, k16})
      for (const size_t elements : {size_t{256}, size_t{4096 + 768}}) {
        SCOPED_TRACE(testing::Message() << static_cast<int>(rule) << ", " << elements);
        const State in = make_state(elements);
        const Array gradient(dtype, random_values(elements, 4));
        const std::vector<FlatRange> ranges = {{0, static_cast<int64_t>(elements), kDecay}};
        const State out = run(rule, in, gradient, dtype, ranges);
        const State want = expected(rule, in, gradient.values(), true);
        EXPECT_EQ(out.weights, want.weights);
        EXPECT_EQ(out.first, want.first);
        EXPECT_EQ(out.second, want.second);
        EXPECT_EQ(out.first_scale, want.first_scale);
        EXPECT_EQ(out.second_scale, want.second_scale);
        const Array rounded(k16, Values(out.weights.begin(), out.weights.end()));
        EXPECT_EQ(Values(out.copy.begin(), out.copy.end()), rounded.values());
      }
}

TEST_F(Blockwise, ChangesItsTilesAlone) {
  for (const Rule rule : kRules) {
    const State in = make_state(1024);
    const Array gradient(k32, random_values(1024, 4));
    const State out = run(rule, in, gradient, k32, {{256, 768, 0}}),
                want = expected(rule, in, gradient.values(), false);
    for (size_t i = 0; i < 1024; ++i) {
      const bool is_in = i >= 256 && i < 768;
      ASSERT_EQ(out.weights[i], (is_in ? want : in).weights[i]) << i;
      ASSERT_EQ(out.first[i], (is_in ? want : in).first[i]) << i;
      ASSERT_EQ(out.second_scale[i / 256], (is_in ? want : in).second_scale[i / 256]) << i;
    }
  }
}

TEST_F(Blockwise, SkippedStep_ChangesNothing) {
  for (const Rule rule : kRules) {
    const State in = make_state(512);
    const Array gradient(k32, random_values(512, 4));
    const State out = run(rule, in, gradient, k32, {{0, 512, kDecay}}, 1);
    EXPECT_EQ(out.weights, in.weights);
    EXPECT_EQ(out.first, in.first);
    EXPECT_EQ(out.second_scale, in.second_scale);
  }
}

TEST_F(Blockwise, ZeroBlocks_StayZero) {
  State in = make_state(256);
  std::fill(in.weights.begin(), in.weights.end(), 0.0F);
  in.first.assign(256, 0);
  in.second.assign(256, 0);
  in.first_scale = in.second_scale = {0.0F};
  for (const Rule rule : kRules) {
    const State out = run(rule, in, Array(k32, Values(256, 0.0)), k32, {{0, 256, kDecay}});
    EXPECT_EQ(out.weights, in.weights);
    EXPECT_EQ(out.first, in.first);
    EXPECT_EQ(out.second, in.second);
    EXPECT_EQ(out.second_scale, in.second_scale);
  }
}

}  // namespace
}  // namespace capstan::kernels::test
