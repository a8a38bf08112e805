// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/lr_schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <string_view>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"

namespace capstan::optim {
namespace {

constexpr std::array<std::pair<std::string_view, LrKind>, 5> kKinds{{
    {"constant", LrKind::kConstant},
    {"linear", LrKind::kLinear},
    {"cosine", LrKind::kCosine},
    {"wsd", LrKind::kWsd},
    {"inverse_sqrt", LrKind::kInverseSqrt},
}};

LrKind kind_of(const std::string& name) {
  for (const auto& [known, kind] : kKinds)
    if (name == known) return kind;
  throw ConfigError(ErrorText{.module = "optim",
                              .what = "reading lr_schedule.kind",
                              .got = "'" + name + "'",
                              .need = "constant, linear, cosine, wsd or inverse_sqrt",
                              .why = {},
                              .fix = {}});
}

// Part of [begin, begin + length] that lies behind x.
double phase(int64_t x, int64_t begin, int64_t length) {
  if (length <= 0) return x >= begin ? 1.0 : 0.0;
  return std::clamp(static_cast<double>(x - begin) / static_cast<double>(length), 0.0, 1.0);
}

double factor_at(const LrSchedule& s, int64_t x) {
  if (x < s.warmup) return static_cast<double>(x) / static_cast<double>(s.warmup);
  const double r = s.min_ratio;
  switch (s.kind) {
    case LrKind::kConstant:
      return 1.0;
    case LrKind::kLinear:
      return 1.0 - (1.0 - r) * phase(x, s.warmup, s.decay);
    case LrKind::kCosine:
      return r + (1.0 - r) * 0.5 * (1.0 + std::cos(std::numbers::pi * phase(x, s.warmup, s.decay)));
    case LrKind::kWsd:
      return 1.0 - (1.0 - r) * phase(x, s.total - s.decay, s.decay);
    case LrKind::kInverseSqrt: {
      const auto start = static_cast<double>(std::max(s.warmup, s.one_step));
      return std::max(r, std::min(1.0, std::sqrt(start / static_cast<double>(x))));
    }
  }
  throw InternalError("[optim] unknown learning-rate schedule");
}

void check_lengths(const LrSchedule& s, bool has_decay, const std::string& unit) {
  const auto refuse = [&](std::string got, std::string need, std::string fix) {
    throw ConfigError(ErrorText{.module = "optim",
                                .what = "making the learning-rate schedule",
                                .got = std::move(got),
                                .need = std::move(need),
                                .why = fmt::format("the run has {} {}", s.total, unit),
                                .fix = std::move(fix)});
  };
  if (s.warmup < 0 || s.decay < 0)
    refuse(fmt::format("lr_schedule.warmup {} and decay {}", s.warmup, s.decay), "both at least 0",
           "Set lr_schedule.warmup to less than the run, or lr_schedule.decay");
  if (s.kind == LrKind::kWsd && !has_decay)
    refuse("lr_schedule.decay auto", "a length",
           "Set lr_schedule.decay to the last phase's length");
  if (s.kind == LrKind::kWsd && s.warmup + s.decay > s.total)
    refuse(fmt::format("warmup {} + decay {}", s.warmup, s.decay), "at most the run's length",
           "Shorten lr_schedule.warmup or lr_schedule.decay");
}

}  // namespace

double lr_at(const LrSchedule& schedule, int64_t progress) {
  CAPSTAN_CHECK(progress >= 1, "learning rate asked for at progress {}", progress);
  return schedule.peak * factor_at(schedule, progress);
}

double lr_of_step(const LrSchedule& schedule, int64_t steps_before) {
  return lr_at(schedule, (steps_before + 1) * schedule.one_step);
}

LrSchedule make_lr_schedule(const recipe::LrSchedule& recipe, double peak, int64_t total_steps,
                            int64_t tokens_per_step) {
  LrSchedule s;
  s.kind = kind_of(recipe.kind);
  s.peak = peak;
  s.min_ratio = recipe.min_ratio;
  s.one_step = recipe.unit == "tokens" ? tokens_per_step : 1;
  s.warmup = recipe.warmup;
  s.total = total_steps * s.one_step;
  // A run shorter than its warm-up never decays.
  s.decay = recipe.decay.value_or(std::max<int64_t>(0, s.total - s.warmup));
  check_lengths(s, recipe.decay.has_value(), recipe.unit);
  return s;
}

}  // namespace capstan::optim
