// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <limits>

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
    t.second = wave(count, 2.1, type).square_();
  }
  [[nodiscard]] FlatJob job(bool decay = true) const { return {&t, 0, t.weights.numel(), decay}; }
  void update(const FlatStep& step, bool decay = true) const {
    const FlatJob whole = job(decay);
    update_flat(UpdateRule::kSophia, {&whole, 1}, step);
  }
};

const FlatStep kStep{.lr = 1e-2, .beta1 = 0.965, .beta2 = 0.99, .weight_decay = 0.1, .rho = 0.04};

// The authors' program on three steps of three weights, with labels drawn after the first: the
// curvature there is without the 8 tokens of the batch, which come in at the quotient.
TEST(Sophia, ThreeSteps_AreTheAuthors) {
  Fixture f(3);
  f.t.weights.copy_(at::tensor({1.0, -2.0, 0.5}, at::kDouble));
  f.t.second.zero_();
  const double gradients[3][3] = {{0.1, -0.2, 0}, {-0.5, 0.05, 0.3}, {0.02, 0.4, -0.1}};
  for (int t = 0; t < 3; ++t) {
    f.t.gradient.copy_(at::tensor(at::ArrayRef<double>(gradients[t], 3)));
    f.update(kStep);
    if (t > 0) continue;
    f.t.gradient.copy_(at::tensor({0.3, 0.1, 0.2}, at::kDouble));
    update_curvature(f.job(), 0.99, 8);
  }
  EXPECT_LT(difference(f.t.weights, at::tensor({1.0070130, -1.9840360, 0.4785115}, at::kDouble)),
            1e-7);
  EXPECT_LT(difference(f.t.first, at::tensor({-0.0129282, 0.0091702, 0.0066325}, at::kDouble)),
            1e-7);
  EXPECT_LT(difference(f.t.second, at::tensor({9e-4, 1e-4, 4e-4}, at::kDouble) * 8), 1e-15);
}

TEST(Sophia, AnyStep_EqualsThePaperInFp64) {
  Fixture f(1000);
  Tensor w = f.t.weights.clone(), m = at::zeros({1000}, at::kDouble), h = f.t.second.clone();
  FlatStep step = kStep;
  step.rho = 0.5;
  step.gradient_scale = 0.25;
  int64_t clipped = 0;
  for (int t = 1; t <= 3; ++t) {
    const Tensor g = wave(1000, t);
    f.t.gradient.copy_(g);
    f.update(step);
    m = m * 0.965 + g * 0.25 * 0.035;
    const Tensor quotient = m / (h * 0.5 + 1e-15);
    clipped += quotient.abs().gt(1).sum().item<int64_t>();
    w = w * (1 - 1e-2 * 0.1) - quotient.clamp(-1, 1) * 1e-2;
    f.t.gradient.copy_(g * 3);
    update_curvature(f.job(), 0.99, 7);
    h = h * 0.99 + g.square() * 9 * 7 * 0.01;
  }
  EXPECT_LT(difference(f.t.weights, w), 1e-15);
  EXPECT_LT(difference(f.t.first, m), 1e-16);
  EXPECT_LT(difference(f.t.second, h), 1e-14);
  EXPECT_GT(clipped, 50);
  EXPECT_LT(clipped, 2900);
}

TEST(Sophia, NothingKnown_MovesNothing) {
  Fixture f(512, at::kFloat);
  f.t.gradient.zero_();
  f.t.second.zero_();
  const Tensor before = f.t.weights.clone();
  f.update(kStep, false);
  EXPECT_TRUE(f.t.weights.equal(before));
}

TEST(Sophia, CurvatureOfWhatIsNotFinite_Stays) {
  Fixture f(5000, at::kFloat);
  f.t.gradient = f.t.gradient.to(at::kBFloat16);
  f.t.gradient[7] = std::numeric_limits<double>::infinity();
  f.t.gradient[4999] = std::numeric_limits<double>::quiet_NaN();
  const Tensor before = f.t.second.clone();
  update_curvature({&f.t, 3, 5000, true}, 0.5, 2);
  const Tensor changed = f.t.second.ne(before);
  EXPECT_FALSE(changed.narrow(0, 0, 3).any().item<bool>());
  EXPECT_FALSE(changed[7].item<bool>());
  EXPECT_FALSE(changed[4999].item<bool>());
  EXPECT_GT(changed.sum().item<int64_t>(), 4900);
  EXPECT_TRUE(f.t.second.isfinite().all().item<bool>());
}

TEST(Sophia, SameBitsForAnyThreadCountAndInstructionSet) {
  const int before = at::get_num_threads();
  std::vector<Fixture> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    runs.emplace_back(100003, at::kFloat).update(kStep);
  }
  at::set_num_threads(before);
  const Fixture f(100003, at::kFloat);
  cpu::plain::kKernels.sophia.f32(
      {f.t.weights.data_ptr<float>(), f.t.gradient.data_ptr<float>(), f.t.first.data_ptr<float>(),
       f.t.second.data_ptr<float>(), 100003, 0},
      {.gradient_scale = 1,
       .decay = static_cast<float>(1 - kStep.lr * kStep.weight_decay),
       .beta1 = static_cast<float>(kStep.beta1),
       .rest1 = static_cast<float>(1 - kStep.beta1),
       .step_size = static_cast<float>(kStep.lr),
       .rho = static_cast<float>(kStep.rho)});
  for (const Fixture& run : runs) {
    EXPECT_TRUE(run.t.weights.equal(f.t.weights));
    EXPECT_TRUE(run.t.first.equal(f.t.first));
    EXPECT_TRUE(run.t.second.equal(f.t.second));
  }
}

TEST(Sophia, WithoutCurvature_IsRefused) {
  Fixture f(16);
  f.t.second = Tensor();
  EXPECT_THROW(f.update(kStep), InternalError);
}

}  // namespace
}  // namespace capstan::optim
