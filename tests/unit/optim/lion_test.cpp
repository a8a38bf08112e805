// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/optim/flat_update.h"
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
  }
  void update(const FlatStep& step, bool decay = true) {
    const FlatJob job{&t, 0, t.weights.numel(), decay};
    update_flat(UpdateRule::kLion, {&job, 1}, step);
  }
};

const FlatStep kStep{.lr = 3e-3, .beta1 = 0.9, .beta2 = 0.95, .weight_decay = 0.1};

// Algorithm 2 of the paper, with the decay inside the step: eta (sign(c) + lambda theta).
TEST(Lion, ThreeSteps_EqualThePaperInFp64) {
  Fixture f(1000);
  Tensor w = f.t.weights.clone(), m = at::zeros({1000}, at::kDouble);
  for (int t = 1; t <= 3; ++t) {
    const Tensor g = wave(1000, t);
    f.t.gradient.copy_(g);
    FlatStep step = kStep;
    step.count = t;
    step.gradient_scale = 0.25;
    f.update(step);
    const Tensor c = m * 0.9 + g * 0.25 * 0.1;
    w = w - 3e-3 * (c.sign() + 0.1 * w);
    m = m * 0.95 + g * 0.25 * 0.05;
  }
  EXPECT_LT(difference(f.t.weights, w), 1e-15);
  EXPECT_LT(difference(f.t.first, m), 1e-16);
}

TEST(Lion, ZeroDirection_MovesNothing) {
  Fixture f(512, at::kFloat);
  f.t.gradient.zero_();
  const Tensor before = f.t.weights.clone();
  f.update(kStep, false);
  EXPECT_TRUE(f.t.weights.equal(before));
}

TEST(Lion, CopyIsTheRoundedMaster) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    Fixture f(40007, at::kFloat);
    f.t.copy = at::zeros({40007}, type);
    f.update(kStep);
    EXPECT_TRUE(f.t.copy.equal(f.t.weights.to(type)));
  }
}

TEST(Lion, Bf16Gradient_EqualsItsWidenedValue) {
  Fixture a(9999, at::kFloat), b(9999, at::kFloat);
  a.t.gradient = a.t.gradient.to(at::kBFloat16);
  b.t.gradient = a.t.gradient.to(at::kFloat);
  a.update(kStep);
  b.update(kStep);
  EXPECT_TRUE(a.t.weights.equal(b.t.weights));
  EXPECT_TRUE(a.t.first.equal(b.t.first));
}

TEST(Lion, SameBitsForAnyThreadCountAndInstructionSet) {
  const int before = at::get_num_threads();
  std::vector<Fixture> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    runs.emplace_back(100003, at::kFloat).update(kStep);
  }
  at::set_num_threads(before);
  Fixture f(100003, at::kFloat);
  cpu::plain::kKernels.lion.f32({f.t.weights.data_ptr<float>(), f.t.gradient.data_ptr<float>(),
                                 f.t.first.data_ptr<float>(), nullptr, 100003, 0},
                                {.gradient_scale = 1,
                                 .decay = static_cast<float>(1 - kStep.lr * kStep.weight_decay),
                                 .beta1 = static_cast<float>(kStep.beta1),
                                 .rest1 = static_cast<float>(1 - kStep.beta1),
                                 .beta2 = static_cast<float>(kStep.beta2),
                                 .rest2 = static_cast<float>(1 - kStep.beta2),
                                 .step_size = static_cast<float>(kStep.lr)});
  for (const Fixture& run : runs) {
    EXPECT_TRUE(run.t.weights.equal(f.t.weights));
    EXPECT_TRUE(run.t.first.equal(f.t.first));
  }
}

TEST(Lion, SecondMoment_IsRefused) {
  Fixture f(16);
  f.t.second = at::zeros({16}, at::kDouble);
  EXPECT_THROW(f.update(kStep), InternalError);
}

}  // namespace
}  // namespace capstan::optim
