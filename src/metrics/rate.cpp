// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/rate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "capstan/base/bytes.h"

namespace capstan::metrics {

double tokens_per_second(int64_t tokens, double milliseconds) {
  return milliseconds > 0 ? static_cast<double>(tokens) * 1000.0 / milliseconds : 0.0;
}

std::optional<double> model_flops_utilisation(double flops_per_token, double tokens_per_s,
                                              double peak_flops_per_rank, int world_size) {
  const double peak = peak_flops_per_rank * world_size;
  if (!(flops_per_token > 0) || !(peak > 0) || !std::isfinite(peak)) return std::nullopt;
  return flops_per_token * tokens_per_s / peak;
}

void RateMeter::add(double step_seconds, int64_t tokens) {
  ring_[static_cast<size_t>(count_ % kWindow)] = {step_seconds, tokens};
  ++count_;
}

int64_t RateMeter::first() const {
  const int64_t skip = count_ > 1 ? 1 : 0;
  return std::max(skip, count_ - kWindow);
}

std::optional<double> RateMeter::seconds_per_step() const {
  if (count_ == 0) return std::nullopt;
  double seconds = 0;
  for (int64_t i = first(); i < count_; ++i)
    seconds += ring_[static_cast<size_t>(i % kWindow)].seconds;
  return seconds / static_cast<double>(count_ - first());
}

std::optional<double> RateMeter::tokens_per_s() const {
  double seconds = 0, tokens = 0;
  for (int64_t i = first(); i < count_; ++i) {
    const Sample& sample = ring_[static_cast<size_t>(i % kWindow)];
    seconds += sample.seconds;
    tokens += static_cast<double>(sample.tokens);
  }
  if (!(seconds > 0)) return std::nullopt;
  return tokens / seconds;
}

std::optional<double> RateMeter::eta_s(int64_t steps_left) const {
  const std::optional<double> each = seconds_per_step();
  if (!each || steps_left < 0) return std::nullopt;
  return *each * static_cast<double>(steps_left);
}

std::optional<double> memory_deviation(const MemoryOutcome& outcome) {
  if (outcome.predicted_peak_bytes <= 0) return std::nullopt;
  const auto predicted = static_cast<double>(outcome.predicted_peak_bytes);
  return (static_cast<double>(outcome.counted_peak_bytes) - predicted) / predicted;
}

bool is_memory_as_predicted(const MemoryOutcome& outcome) {
  const int64_t off = std::abs(outcome.counted_peak_bytes - outcome.predicted_peak_bytes);
  return off <= std::max(outcome.predicted_peak_bytes / 10, 16 * kMiB);
}

std::string format_memory(const MemoryOutcome& outcome) {
  std::string out = "peak memory: ";
  if (const auto deviation = memory_deviation(outcome)) {
    out += fmt::format("predicted {}, counted {} ({:+.1f} %)",
                       format_bytes(outcome.predicted_peak_bytes),
                       format_bytes(outcome.counted_peak_bytes), *deviation * 100);
  } else {
    out += "counted " + format_bytes(outcome.counted_peak_bytes);
  }
  if (outcome.resident_peak_bytes > 0) {
    out += ", resident " + format_bytes(outcome.resident_peak_bytes);
  }
  return out;
}

}  // namespace capstan::metrics
