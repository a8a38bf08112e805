// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "capstan/metrics/tensorboard.h"

namespace capstan::metrics {

namespace {

// -limit ... -1e-12, 0, 1e-12 ... limit in steps of 10 %.
const std::vector<double>& bucket_limits() {
  static const std::vector<double> limits = [] {
    std::vector<double> positive;
    for (double value = 1e-12; value < 1e20; value *= 1.1) positive.push_back(value);
    positive.push_back(std::numeric_limits<double>::max());
    std::vector<double> all;
    for (auto value = positive.rbegin(); value != positive.rend(); ++value) all.push_back(-*value);
    all.push_back(0.0);
    all.insert(all.end(), positive.begin(), positive.end());
    return all;
  }();
  return limits;
}

}  // namespace

Histogram make_histogram(std::span<const float> values) {
  const std::vector<double>& limits = bucket_limits();
  std::vector<double> counts(limits.size(), 0.0);
  Histogram out{.min = std::numeric_limits<double>::infinity(),
                .max = -std::numeric_limits<double>::infinity()};
  for (const float single : values) {
    const double value = single;
    if (!std::isfinite(value)) continue;
    const auto bucket = std::upper_bound(limits.begin(), limits.end(), value) - limits.begin();
    counts[std::min(static_cast<size_t>(bucket), limits.size() - 1)] += 1;
    out.min = std::min(out.min, value);
    out.max = std::max(out.max, value);
    out.count += 1;
    out.sum += value;
    out.sum_squares += value * value;
  }
  if (out.count == 0) return {.limits = {0.0}, .counts = {0.0}};
  const auto is_used = [](double count) { return count > 0; };
  const auto first = std::find_if(counts.begin(), counts.end(), is_used) - counts.begin();
  const auto last = counts.rend() - std::find_if(counts.rbegin(), counts.rend(), is_used);
  // One empty bucket below keeps the lower end of the first used one.
  const auto begin = std::max<std::ptrdiff_t>(0, first - 1);
  out.limits.assign(limits.begin() + begin, limits.begin() + last);
  out.counts.assign(counts.begin() + begin, counts.begin() + last);
  return out;
}

}  // namespace capstan::metrics
