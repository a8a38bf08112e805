// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The loss scale of fp16 runs: token weights carry it, the optimizer divides it out. Decisions rest
// on flags that all ranks share, so all ranks keep the same scale.
#pragma once
#include <cstdint>

namespace capstan::optim {

struct LossScaleOptions {
  bool dynamic = false;
  double start = 1.0;    // the scale itself when not dynamic
  double growth = 2.0;   // after `interval` good steps
  double backoff = 0.5;  // after a non-finite step
  int64_t interval = 2000;
  double smallest = 1.0, largest = 16777216.0;  // 2^24
};
// Where dynamic scaling starts.
inline constexpr double kFirstLossScale = 65536.0;

class LossScale {
 public:
  explicit LossScale(const LossScaleOptions& options) : options_(options), value_(options.start) {}
  [[nodiscard]] double value() const { return value_; }
  [[nodiscard]] int64_t good_steps() const { return good_steps_; }
  // After each step whose gradients were computed. Spikes and skips for other reasons count as
  // good.
  void update(bool is_finite);
  void restore(double value, int64_t good_steps);

 private:
  LossScaleOptions options_;
  double value_;
  int64_t good_steps_ = 0;
};

}  // namespace capstan::optim
