// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Learning-rate schedules: pure functions of progress, so that a resume needs no state and any
// layout sees the same numbers.
//
// Progress x counts steps or tokens and includes the step it is asked for, so the first step is not
// spent at rate zero and the last step of a run lies exactly at min_ratio. With W = warmup,
// D = decay, N = total, r = min_ratio, s = clamp((x - W) / D, 0, 1), factor f(x) = lr / peak:
//   x < W          f = x / W, for every kind
//   constant       f = 1
//   linear         f = 1 - (1 - r) s
//   cosine         f = r + (1 - r) (1 + cos(pi s)) / 2
//   wsd            f = 1 until x = N - D, then 1 - (1 - r) clamp((x - (N - D)) / D, 0, 1)
//   inverse_sqrt   f = max(r, sqrt(max(W, 1 step) / x))
// linear and cosine stay at r after x = W + D; D = auto means N - W.
#pragma once
#include <cstdint>
#include <optional>

#include "capstan/recipe/recipe.h"

namespace capstan::optim {

enum class LrKind { kConstant, kLinear, kCosine, kWsd, kInverseSqrt };

struct LrSchedule {
  LrKind kind = LrKind::kConstant;
  double peak = 0;
  double min_ratio = 0;
  // All in the unit of progress. one_step is a step in that unit.
  int64_t warmup = 0, decay = 0, total = 0, one_step = 1;
};

// progress >= 1: the units done when the step at hand is finished.
[[nodiscard]] double lr_at(const LrSchedule& schedule, int64_t progress);
// The same for a step number: steps_before finished steps lie before the step at hand.
[[nodiscard]] double lr_of_step(const LrSchedule& schedule, int64_t steps_before);

// What a recipe says. Throws ConfigError where lengths do not fit one another (wsd without decay,
// a decay phase of no length, warmup + decay longer than the run under wsd).
[[nodiscard]] LrSchedule make_lr_schedule(const recipe::LrSchedule& recipe, double peak,
                                          int64_t total_steps, int64_t tokens_per_step);

}  // namespace capstan::optim
