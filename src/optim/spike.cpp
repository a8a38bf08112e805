// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/spike.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "capstan/base/check.h"

namespace capstan::optim {

std::optional<double> SpikeDetector::threshold(const std::vector<double>& values) const {
  const auto known = static_cast<int64_t>(values.size());
  if (known < std::max<int64_t>(2, options_.window / 2)) return std::nullopt;
  double mean = 0, squares = 0;
  for (const double v : values) mean += v / static_cast<double>(known);
  for (const double v : values) squares += (v - mean) * (v - mean);
  const double deviation = std::sqrt(squares / static_cast<double>(known - 1));
  // Values that repeat to the last bit would make the next rounding error a spike.
  return mean + *options_.sigma * std::max(deviation, 1e-6 * std::max(1.0, std::fabs(mean)));
}

void SpikeDetector::keep(std::vector<double>& values, double value) const {
  if (static_cast<int64_t>(values.size()) >= options_.window) values.erase(values.begin());
  values.push_back(value);
}

bool SpikeDetector::is_spike(double loss, double norm) {
  if (!options_.sigma) return false;
  CAPSTAN_CHECK(std::isfinite(loss) && std::isfinite(norm), "spike test of loss {} and norm {}",
                loss, norm);
  const auto loss_limit = threshold(losses_), norm_limit = threshold(norms_);
  const bool spike = (loss_limit && loss > *loss_limit) || (norm_limit && norm > *norm_limit);
  keep(losses_, loss_limit ? std::min(loss, *loss_limit) : loss);
  keep(norms_, norm_limit ? std::min(norm, *norm_limit) : norm);
  return spike;
}

void SpikeDetector::restore(std::vector<double> losses, std::vector<double> norms) {
  for (auto* values : {&losses, &norms}) {  // the window may have been longer when they were saved
    const auto extra = static_cast<int64_t>(values->size()) - options_.window;
    if (extra > 0) values->erase(values->begin(), values->begin() + extra);
  }
  losses_ = std::move(losses);
  norms_ = std::move(norms);
}

}  // namespace capstan::optim
