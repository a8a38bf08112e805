// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What becomes of a step, against the rules written down once more.
#include <algorithm>
#include <cmath>
#include <vector>

#include "capstan/base/error.h"
#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

// State and windows in device memory, from step to step.
class Steps {
 public:
  explicit Steps(const DecideStepArgs& rules, const StepState& start = {})
      : rules_(rules), windows_(bytes_of_windows()) {
    state_.write(&start, sizeof start);
    const Values none(bytes_of_windows() / sizeof(double), NAN);
    windows_.write(none.data(), bytes_of_windows());
  }
  StepState decide(const StepSums& sums, bool is_void = false) {
    const double flag = is_void ? 1 : 0;
    sums_.write(&sums, sizeof sums);
    void_.write(&flag, sizeof flag);
    DecideStepArgs args = rules_;
    args.sums = static_cast<const StepSums*>(sums_.data());
    args.is_void = static_cast<const double*>(void_.data());
    args.windows = static_cast<double*>(windows_.data());
    args.state = static_cast<StepState*>(state_.data());
    api().decide_step(args, nullptr);
    StepState state;
    state_.read(&state, sizeof state);
    return state;
  }

 private:
  [[nodiscard]] size_t bytes_of_windows() const {
    return static_cast<size_t>(2 * rules_.spikes.window + 1) * sizeof(double);
  }

  DecideStepArgs rules_;
  Memory windows_, state_{sizeof(StepState)}, sums_{sizeof(StepSums)}, void_{sizeof(double)};
};

StepState decided(const StepSums& sums, double max_norm, double loss_scale, bool is_void = false) {
  Steps steps({.max_norm = max_norm},
              {.lr = 0.5, .gradient_scale = 9, .count = 4, .skip = 1, .loss_scale = loss_scale});
  return steps.decide(sums, is_void);
}

class DecideStep : public KernelTest {};

TEST_F(DecideStep, ClipsAndCounts) {
  const StepState clipped = decided({.squares = 16.0}, 1.0, 2.0);
  EXPECT_DOUBLE_EQ(clipped.norm, 2.0);
  EXPECT_DOUBLE_EQ(clipped.gradient_scale, 0.5 / (2.0 + 1e-6));
  EXPECT_EQ(clipped.count, 5);
  EXPECT_EQ(clipped.skip, 0);
  EXPECT_DOUBLE_EQ(clipped.lr, 0.5);
  EXPECT_EQ(clipped.loss_scale, 2.0);
  EXPECT_DOUBLE_EQ(decided({.squares = 16.0}, 100.0, 1.0).gradient_scale, 1.0);
  EXPECT_DOUBLE_EQ(decided({.squares = 16.0}, 0.0, 4.0).gradient_scale, 0.25);
}

TEST_F(DecideStep, SkipsWhatIsNotFiniteOrVoid) {
  const std::vector<StepSums> broken = {
      {.loss = NAN},          {.loss = INFINITY},
      {.squares = NAN},       {.squares = INFINITY},  // no part was, their sum is
      {.non_finite_loss = 2}, {.non_finite_gradient = 1}};
  for (const StepSums& sums : broken) {
    const StepState skipped = decided(sums, 1.0, 1.0);
    EXPECT_EQ(skipped.count, 4);
    EXPECT_EQ(skipped.skip, 1);
  }
  EXPECT_EQ(decided({.squares = 1}, 1.0, 1.0, true).skip, 1);
  EXPECT_EQ(decided({.squares = 1}, 1.0, 1.0, false).skip, 0);
}

TEST_F(DecideStep, LossScale_FollowsTheSteps) {
  const LossScaleRule rule{.interval = 3, .smallest = 0.5, .largest = 8};
  Steps steps({.loss_scale = rule}, {.loss_scale = 2});
  const StepSums good{.squares = 4}, bad{.squares = NAN};
  const auto scale = [&](const StepSums& sums, bool is_void = false) {
    return steps.decide(sums, is_void).loss_scale;
  };
  EXPECT_EQ(scale(good), 2);
  EXPECT_EQ(scale(good), 2);
  EXPECT_EQ(scale(bad), 1);
  EXPECT_EQ(scale(good), 1);  // the steps before are forgotten
  EXPECT_EQ(scale(good, true), 1);
  EXPECT_EQ(scale(good), 2);                   // a void step is a good one
  const StepState after = steps.decide(good);  // by the new scale, at which it is the first
  EXPECT_DOUBLE_EQ(after.norm, 1.0);
  EXPECT_EQ(after.loss_scale, 2);
  EXPECT_EQ(after.good_steps, 1);
  for (int i = 0; i < 12; ++i) (void)scale(good);
  EXPECT_EQ(scale(good), 8);
  for (int i = 0; i < 6; ++i) (void)scale(bad);
  EXPECT_EQ(scale(good), 0.5);
}

// The window as a list, oldest first.
struct PlainWindow {
  double limit(const SpikeRule& rule) const {
    const auto count = static_cast<double>(values.size());
    if (count < 2 || static_cast<int64_t>(values.size()) < rule.window / 2) return INFINITY;
    double mean = 0, squares = 0;
    for (const double x : values) mean += x / count;
    for (const double x : values) squares += (x - mean) * (x - mean);
    return mean + rule.sigma * std::max(std::sqrt(squares / (count - 1)),
                                        1e-6 * std::max(1.0, std::fabs(mean)));
  }
  void take(const SpikeRule& rule, double value) {
    const double held = std::min(value, limit(rule));
    if (static_cast<int64_t>(values.size()) == rule.window) values.erase(values.begin());
    values.push_back(held);
  }
  std::vector<double> values;
};

TEST_F(DecideStep, Spikes_AreThoseOfAPlainWindow) {
  for (const int64_t window : {1, 2, 5, 16}) {
    const SpikeRule rule{.sigma = 2.5, .window = window};
    Steps steps({.spikes = rule}, {.loss_scale = 4});
    PlainWindow losses, norms;
    const Values noise = random_values(400, 3);
    int64_t spikes = 0, count = 0;
    for (size_t i = 0; i < 200; ++i) {
      const double loss = 3 + noise[2 * i] + (i % 31 == 30 ? 40 : 0);
      const double norm = 1 + std::fabs(noise[2 * i + 1]) + (i % 47 == 46 ? 1e6 : 0);
      const bool is_void = i % 13 == 12, is_broken = i % 17 == 16;
      const StepSums sums{
          .loss = loss, .squares = 16 * norm * norm, .non_finite_gradient = is_broken ? 1.0 : 0.0};
      bool skips = is_void || is_broken;
      if (!skips) {
        const double held = std::sqrt(sums.squares) / 4;
        skips = loss > losses.limit(rule) || held > norms.limit(rule);
        spikes += skips ? 1 : 0;
        losses.take(rule, loss);
        norms.take(rule, held);
      }
      count += skips ? 0 : 1;
      const StepState state = steps.decide(sums, is_void);
      ASSERT_EQ(state.skip, skips ? 1 : 0) << window << " at " << i;
      ASSERT_EQ(state.count, count);
    }
    EXPECT_EQ(spikes > 3, window > 1) << spikes;
  }
}

TEST_F(DecideStep, WithoutWindows_IsRefused) {
  const StepSums sums;
  const double is_void = 0;
  StepState state;
  EXPECT_THROW(api().decide_step({.sums = &sums,
                                  .is_void = &is_void,
                                  .spikes = {.sigma = 1, .window = 4},
                                  .state = &state},
                                 nullptr),
               InternalError);
}

}  // namespace
}  // namespace capstan::kernels::test
