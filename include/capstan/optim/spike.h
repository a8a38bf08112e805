// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Spike detection: a step is skipped when its loss or its gradient norm lies more than sigma
// deviations above the mean of the last `window` steps. Fed with values that are already summed
// over ranks, so all ranks decide alike.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

namespace capstan::optim {

struct SpikeOptions {
  std::optional<double> sigma;  // no value: never a spike
  int64_t window = 128;
};

class SpikeDetector {
 public:
  explicit SpikeDetector(const SpikeOptions& options) : options_(options) {}
  // Judges a finite step and takes it into the window. There is no verdict before half the window
  // (at least two steps) is known. A spike enters the window at the height of its threshold: it
  // neither widens the deviation by its full size nor keeps a new level out for ever.
  [[nodiscard]] bool is_spike(double loss, double norm);

  [[nodiscard]] const std::vector<double>& losses() const { return losses_; }  // oldest first
  [[nodiscard]] const std::vector<double>& norms() const { return norms_; }
  void restore(std::vector<double> losses, std::vector<double> norms);

 private:
  [[nodiscard]] std::optional<double> threshold(const std::vector<double>& values) const;
  void keep(std::vector<double>& values, double value) const;

  SpikeOptions options_;
  std::vector<double> losses_, norms_;
};

}  // namespace capstan::optim
