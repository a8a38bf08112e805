// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/flat_update.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "capstan/base/error.h"
#include "optim/cpu/kernels.h"
#include "wave.h"

namespace capstan::optim {
namespace {

struct Fixture {
  FlatTensors t;
  explicit Fixture(int64_t count, at::ScalarType type = at::kDouble) {
    t.weights = wave(count, 0.1, type);
    t.gradient = wave(count, 1.3, type).mul_(0.5);
    t.first = at::zeros({count}, type);
    t.second = at::zeros({count}, type);
  }
  void update(const FlatStep& step, bool decay = true) {
    const FlatJob job{&t, 0, t.weights.numel(), decay};
    update_flat(UpdateRule::kAdamW, {&job, 1}, step);
  }
};

const FlatStep kStep{.lr = 3e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};

TEST(AdamW, ThreeSteps_EqualThePlainFormulaInFp64) {
  Fixture f(1000);
  Tensor w = f.t.weights.clone(), m = at::zeros({1000}, at::kDouble), v = m.clone();
  for (int t = 1; t <= 3; ++t) {
    const Tensor g = wave(1000, t, at::kDouble);
    f.t.gradient.copy_(g);
    FlatStep step = kStep;
    step.count = t;
    step.gradient_scale = 0.25;
    f.update(step);
    const Tensor scaled = g * 0.25;
    m = m * 0.9 + scaled * 0.1;
    v = v * 0.95 + scaled * scaled * 0.05;
    const Tensor mean = m / (1 - std::pow(0.9, t)), square = v / (1 - std::pow(0.95, t));
    w = w * (1 - 3e-3 * 0.1) - 3e-3 * mean / (square.sqrt() + 1e-8);
  }
  EXPECT_LT(difference(f.t.weights, w), 1e-15);
  EXPECT_LT(difference(f.t.first, m), 1e-16);
  EXPECT_LT(difference(f.t.second, v), 1e-16);
}

TEST(AdamW, EqualsTheFusedOperatorOfLibTorch) {
  for (const auto type : {at::kFloat, at::kDouble}) {
    Fixture f(70001, type);
    std::vector<Tensor> w{f.t.weights.clone()}, g{f.t.gradient.clone()}, m{f.t.first.clone()},
        v{f.t.second.clone()}, steps{at::zeros({}, at::kFloat)};
    for (int t = 1; t <= 5; ++t) {
      FlatStep step = kStep;
      step.count = t;
      f.update(step);
      steps[0].fill_(t);
      at::_fused_adamw_(w, g, m, v, {}, steps, 3e-3, 0.9, 0.95, 0.1, 1e-8, false, false);
    }
    const double tolerance = type == at::kFloat ? 4e-7 : 1e-15;
    EXPECT_LT(difference(f.t.weights, w[0]), tolerance);
    EXPECT_LT(difference(f.t.second, v[0]), tolerance);
  }
}

TEST(AdamW, RangeWithoutDecay_KeepsWeightsOfZeroGradient) {
  Fixture f(512);
  f.t.gradient.zero_();
  const Tensor before = f.t.weights.clone();
  const FlatJob jobs[] = {{&f.t, 0, 256, false}, {&f.t, 256, 512, true}};
  update_flat(UpdateRule::kAdamW, jobs, kStep);
  EXPECT_TRUE(f.t.weights.narrow(0, 0, 256).equal(before.narrow(0, 0, 256)));
  EXPECT_LT(difference(f.t.weights.narrow(0, 256, 256), before.narrow(0, 256, 256) * (1 - 3e-4)),
            1e-16);
}

TEST(AdamW, ElementsOutsideOfJobs_AreNotTouched) {
  Fixture f(1024, at::kFloat);
  f.t.copy = at::full({1024}, 7, at::kBFloat16);
  const Tensor before = f.t.weights.clone();
  const FlatJob job{&f.t, 300, 301, true};
  update_flat(UpdateRule::kAdamW, {&job, 1}, kStep);
  EXPECT_EQ(f.t.weights.ne(before).sum().item<int64_t>(), 1);
  EXPECT_EQ(f.t.copy.ne(7).sum().item<int64_t>(), 1);
}

TEST(AdamW, CopyIsTheRoundedMaster) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    Fixture f(40007, at::kFloat);
    f.t.copy = at::zeros({40007}, type);
    f.update(kStep);
    EXPECT_TRUE(f.t.copy.equal(f.t.weights.to(type)));
  }
}

TEST(AdamW, RoundToCopy_TiesToEvenAndKeepsInfinityAndNan) {
  const float inf = std::numeric_limits<float>::infinity();
  const Tensor w = at::tensor({1.00390625F, 1.01171875F, -3.5F, inf, -inf, 3.4e38F, 0.0F, -0.0F});
  const Tensor copy = at::empty({8}, at::kBFloat16);
  round_to_copy(w, copy);
  EXPECT_TRUE(copy.equal(w.to(at::kBFloat16)));
  const Tensor nan = at::full({33}, std::nanf(""), at::kFloat),
               out = at::zeros({33}, at::kBFloat16);
  round_to_copy(nan, out);
  EXPECT_TRUE(out.isnan().all().item<bool>());
}

TEST(AdamW, Bf16Gradient_EqualsItsWidenedValue) {
  Fixture a(9999, at::kFloat), b(9999, at::kFloat);
  a.t.gradient = a.t.gradient.to(at::kBFloat16);
  b.t.gradient = a.t.gradient.to(at::kFloat);
  a.update(kStep);
  b.update(kStep);
  EXPECT_TRUE(a.t.weights.equal(b.t.weights));
  EXPECT_TRUE(a.t.second.equal(b.t.second));
}

TEST(AdamW, SameBitsForAnyThreadCountAndInstructionSet) {
  const int before = at::get_num_threads();
  std::vector<Tensor> results;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    Fixture f(100003, at::kFloat);
    f.update(kStep);
    results.push_back(f.t.weights);
  }
  at::set_num_threads(before);
  EXPECT_TRUE(results[0].equal(results[1]));
  Fixture f(100003, at::kFloat);
  const auto step = kStep;
  const cpu::Factors<float> factors{1.0F,
                                    static_cast<float>(1 - step.lr * step.weight_decay),
                                    static_cast<float>(step.beta1),
                                    static_cast<float>(1 - step.beta1),
                                    static_cast<float>(step.beta2),
                                    static_cast<float>(1 - step.beta2),
                                    static_cast<float>(step.lr / (1 - step.beta1)),
                                    static_cast<float>(1 / std::sqrt(1 - step.beta2)),
                                    static_cast<float>(step.eps),
                                    0,
                                    1};
  cpu::plain::kKernels.adamw.f32(
      {f.t.weights.data_ptr<float>(), f.t.gradient.data_ptr<float>(), f.t.first.data_ptr<float>(),
       f.t.second.data_ptr<float>(), 100003, 0},
      factors);
  EXPECT_TRUE(results[0].equal(f.t.weights));
}

TEST(AdamW, TensorsThatDoNotFit_AreRefused) {
  Fixture f(16);
  f.t.second = at::zeros({15}, at::kDouble);
  EXPECT_THROW(f.update(kStep), InternalError);
  Fixture g(16, at::kFloat);
  g.t.gradient = at::zeros({16}, at::kDouble);
  EXPECT_THROW(g.update(kStep), InternalError);
}

}  // namespace
}  // namespace capstan::optim
