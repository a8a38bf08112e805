// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Loss scale and spikes decided on the fake device, which device_test.cpp installs: the decisions
// of the host's rules, step for step, and a run that goes on where another one stopped.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/base/philox.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/optim/device_step.h"
#include "engine/step_control_internal.h"
#include "ranks/device_runs.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::engine::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class DecidedOnADevice : public ::testing::TestWithParam<bool> {
 public:
  void SetUp() override {
    if (GetParam()) ops::install_device_kernels(&test::fake_kernels());
  }
  void TearDown() override { ops::install_device_kernels(nullptr); }
};

optim::DeviceStepOptions rules() {
  return {.max_norm = 1.5,
          .loss_scale = {.dynamic = true, .start = 8, .interval = 7, .smallest = 2, .largest = 32},
          .spikes = {.sigma = 3, .window = 12}};
}

// The rules of the host over the same sums.
struct Host {
  bool close(double loss, double squares, bool is_void) {
    const double norm = std::sqrt(squares) / scale.value();
    const bool is_finite = std::isfinite(loss) && std::isfinite(norm);
    const bool applies = is_finite && !is_void && !spikes.is_spike(loss, norm);
    scale.update(is_finite);
    count += applies ? 1 : 0;
    return applies;
  }
  [[nodiscard]] optim::DecisionState state() const {
    return {count, scale.value(), scale.good_steps(), spikes.losses(), spikes.norms()};
  }
  optim::LossScale scale{rules().loss_scale};
  optim::SpikeDetector spikes{rules().spikes};
  int64_t count = 0;
};

// Restored from the host's state on the way, as from a checkpoint.
TEST_P(DecidedOnADevice, StepsAreThoseOfTheHost) {
  const std::vector<parallel::Shard> none;
  const auto make = [&] {
    return std::make_unique<optim::DeviceStep>(none, test::fake_device(), rules());
  };
  auto device = make();
  Host host;
  int64_t skipped = 0;
  std::vector<double> scales;
  for (uint64_t i = 0; i < 240; ++i) {
    const auto noise = [&](uint64_t stream) { return philox::uniform(5, stream, i); };
    const double loss = i % 37 == 36 ? 50 : 2 + noise(1), norm = i % 29 == 28 ? 1e4 : noise(2);
    const double squares = i % 23 == 22 || (i > 60 && i < 66) ? kNan : norm * norm * 64;
    const bool is_void = i % 19 == 18;
    if (i % 50 == 49) device = make(), device->restore(host.state());
    device->set_step(0.1, is_void);
    device->decide(at::tensor({loss, squares, 0.0, 0.0}, at::kDouble).to(test::fake_device()));
    const double scale = host.scale.value();
    const bool applies = host.close(loss, squares, is_void);
    const optim::StepNumbers& got = device->numbers();
    ASSERT_EQ(got.skip.item<int32_t>(), applies ? 0 : 1) << i;
    ASSERT_EQ(got.count.item<int64_t>(), host.count) << i;
    ASSERT_EQ(got.loss_scale.item<double>(), host.scale.value()) << i;
    ASSERT_EQ(got.good_steps.item<int64_t>(), host.scale.good_steps()) << i;
    ASSERT_TRUE(!applies || got.norm.item<double>() == std::sqrt(squares) / scale) << i;
    skipped += applies ? 0 : 1;
    scales.push_back(scale);
  }
  EXPECT_GT(skipped, 30);
  EXPECT_EQ(*std::min_element(scales.begin(), scales.end()), 2);
  EXPECT_EQ(*std::max_element(scales.begin(), scales.end()), 32);
}

// fp16 with the scale just below its next growth, and a gradient that is not finite in step 3.
std::vector<StepReport> run_fp16(bool ahead) {
  std::vector<StepReport> reports;
  TinyHooks hooks;
  hooks.hooks = [](int) {
    thread_local const test::BackwardOnThisThread here;
    EngineHooks made;
    made.before_reduce = [step = -1](int bucket, const Tensor& gradients) mutable {
      if (bucket == 0) ++step;
      if (bucket == 1 && step == 3) gradients.fill_(kNan);
    };
    return made;
  };
  with_engines(
      {.overrides = {"precision.compute=fp16"}},
      [&](int rank, Engine& engine) {
        EngineScalars scalars = engine.scalars();
        scalars.loss_scale = 1024, scalars.good_steps_at_scale = 1998;
        engine.restore(scalars);
        const auto objective = make_next_token_objective();
        for (int64_t step = 0; step < 6; ++step) {
          engine.start_step(make_batches(engine.plan(), rank, step), *objective);
          if (!ahead || engine.unreported_steps() > 1) reports.push_back(engine.finish_step());
        }
        while (engine.unreported_steps() > 0) reports.push_back(engine.finish_step());
        EXPECT_EQ(engine.scalars().optimizer_count, 5);
        EXPECT_EQ(engine.scalars().good_steps_at_scale, 2);
      },
      hooks);
  return reports;
}

TEST_P(DecidedOnADevice, LossScaleChangesWithoutTheHost) {
  const auto late = run_fp16(true), at_once = run_fp16(false);
  const std::vector<double> scales = {1024, 1024, 2048, 2048, 1024, 1024};
  for (size_t i = 0; i < scales.size(); ++i) {
    EXPECT_EQ(late.at(i).loss_scale, scales[i]) << i;
    EXPECT_EQ(late[i].skipped, i == 3 ? "nonfinite gradient" : "");
    EXPECT_EQ(late[i].loss, at_once.at(i).loss);
    EXPECT_TRUE(i == 3 || late[i].grad_norm == at_once[i].grad_norm) << i;
    EXPECT_NEAR(late[i].loss / late[0].loss, 1, 0.3);  // the scale is taken out
  }
}

// An objective without token weights has its loss scaled on the device too.
TEST_P(DecidedOnADevice, LossScaleOfALossWithoutWeights) {
  class ByLoss final : public Objective {
   public:
    double local_denominator(const std::vector<MicroBatch>& batches) const override {
      return base_->local_denominator(batches);
    }
    Tensor weights(const MicroBatch&, double) const override { return {}; }
    Tensor loss(const nn::TokenScores& scores, const MicroBatch& batch,
                double denominator) const override {
      return base_->loss(scores, batch, denominator);
    }

   private:
    std::unique_ptr<Objective> base_ = make_next_token_objective();
  };
  const TinyRun run{.steps = 3, .overrides = {"precision.compute=fp16"}};
  const auto on_own_thread = [](int) {
    thread_local const test::BackwardOnThisThread here;
    return EngineHooks{};
  };
  const TinyResult by_weights = train(run, {.hooks = on_own_thread, .objective = {}});
  const TinyResult by_loss = train(
      run, {.hooks = on_own_thread, .objective = [](int) { return std::make_unique<ByLoss>(); }});
  for (size_t i = 0; i < by_loss.reports.size(); ++i) {
    EXPECT_NEAR(by_loss.reports[i].loss / by_weights.reports[i].loss, 1, 1e-3);
    EXPECT_NEAR(by_loss.reports[i].grad_norm / by_weights.reports[i].grad_norm, 1, 1e-2);
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, DecidedOnADevice, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "ByOurKernels" : "ByAten"; });

// The host's rules are held against what the device says.
TEST(DecidedOnDevices, AnotherLossScaleThanTheHostsEndsTheRun) {
  StepControl control(make_tiny_plan({.overrides = {"precision.compute=fp16"}}));
  const StepSums sums{.loss = 1, .squares = 1, .target_tokens = 8};
  const double scale = control.loss_scale();
  const StepControl::Decided right{true, 1, 1 / scale, scale};
  StepControl::Decided wrong = right;
  wrong.loss_scale = scale / 2;
  EXPECT_NO_THROW((void)StepControl(control).confirm_step(sums, right));
  EXPECT_THROW((void)control.confirm_step(sums, wrong), InternalError);
}

}  // namespace
}  // namespace capstan::engine::testing
