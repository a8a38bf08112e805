// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Arithmetic of speed: tokens per second, model FLOPs utilisation, time left.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace capstan::metrics {

// 0 when no time has passed.
[[nodiscard]] double tokens_per_second(int64_t tokens, double milliseconds);

// Achieved model FLOP/s over the peak of all ranks together; none when the peak or the count is
// unknown (<= 0).
[[nodiscard]] std::optional<double> model_flops_utilisation(double flops_per_token,
                                                            double tokens_per_s,
                                                            double peak_flops_per_rank,
                                                            int world_size);

// Mean time of the last steps. The first step of an attempt (caches, threads and page faults are
// new) counts only until there is another one.
class RateMeter {
 public:
  void add(double step_seconds, int64_t tokens);
  [[nodiscard]] std::optional<double> seconds_per_step() const;
  [[nodiscard]] std::optional<double> tokens_per_s() const;
  [[nodiscard]] std::optional<double> eta_s(int64_t steps_left) const;

 private:
  static constexpr int64_t kWindow = 32;
  struct Sample {
    double seconds;
    int64_t tokens;
  };
  [[nodiscard]] int64_t first() const;
  std::array<Sample, kWindow> ring_ = {};
  int64_t count_ = 0;
};

struct MemoryOutcome {
  int64_t predicted_peak_bytes = 0;  // by the plan
  int64_t counted_peak_bytes = 0;    // by the allocator
  int64_t resident_peak_bytes = 0;   // of the process; 0 = unknown
};
// (counted - predicted) / predicted; none when nothing was predicted.
[[nodiscard]] std::optional<double> memory_deviation(const MemoryOutcome& outcome);
// True within max(10 %, 16 MiB), the bar the plan is held to.
[[nodiscard]] bool is_memory_as_predicted(const MemoryOutcome& outcome);
// "peak memory: predicted 612 MiB, counted 598 MiB (-2.3 %), resident 0.98 GiB"
[[nodiscard]] std::string format_memory(const MemoryOutcome& outcome);

}  // namespace capstan::metrics
