// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/philox.h"
#include "capstan/data/order.h"

namespace capstan::data {

std::vector<int64_t> largest_remainder(std::span<const double> weights, int64_t slots) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int64_t> quotas(weights.size());
  std::vector<double> remainders(weights.size());
  int64_t left = slots;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double exact = static_cast<double>(slots) * (weights[i] / total);
    quotas[i] = static_cast<int64_t>(std::floor(exact));
    remainders[i] = exact - std::floor(exact);
    left -= quotas[i];
  }
  std::vector<size_t> by_remainder(weights.size());
  std::iota(by_remainder.begin(), by_remainder.end(), size_t{0});
  std::stable_sort(by_remainder.begin(), by_remainder.end(),
                   [&](size_t a, size_t b) { return remainders[a] > remainders[b]; });
  for (size_t i = 0; left > 0; ++i, --left) ++quotas[by_remainder[i % by_remainder.size()]];
  return quotas;
}

BlendOrder::BlendOrder(std::vector<double> weights, uint64_t seed) : seed_(seed) {
  const auto refuse = [&](size_t source, double weight, const char* need, const char* fix) {
    throw ConfigError(
        ErrorText{.module = "data",
                  .what = fmt::format("mixing sources: data.train[{}].weight", source),
                  .got = fmt::format("{}", weight),
                  .need = need,
                  .fix = fix});
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!std::isfinite(weights[i]) || weights[i] <= 0)
      refuse(i, weights[i], "a number above 0", "");
  }
  quotas_ = largest_remainder(weights, kBlendSlots);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (quotas_[i] <= 0) {
      refuse(i, weights[i], "at least 1/65536 of all weights, one slot of a mixing period",
             "Raise it or leave the source out");
    }
  }
}

std::shared_ptr<const BlendOrder::Period> BlendOrder::build_period(int64_t number) const {
  auto period = std::make_shared<Period>();
  period->number = number;
  period->slots.resize(kBlendSlots);
  const Permutation permutation(kBlendSlots, philox::bits64(seed_, philox::stream_of("data.blend"),
                                                            static_cast<uint64_t>(number)));
  std::vector<int64_t> ends(quotas_.size());
  std::partial_sum(quotas_.begin(), quotas_.end(), ends.begin());
  std::vector<uint32_t> seen(quotas_.size());
  for (int64_t i = 0; i < kBlendSlots; ++i) {
    const auto source = static_cast<uint32_t>(
        std::upper_bound(ends.begin(), ends.end(), permutation(i)) - ends.begin());
    period->slots[static_cast<size_t>(i)] = {source, seen[source]++};
  }
  return period;
}

std::shared_ptr<const BlendOrder::Period> BlendOrder::period(int64_t number) const {
  const std::lock_guard lock(mutex_);
  auto& entry = recent_[static_cast<size_t>(number % 2)];  // a batch may straddle two periods
  if (!entry || entry->number != number) entry = build_period(number);
  return entry;
}

BlendOrder::Place BlendOrder::operator()(int64_t sample) const {
  CAPSTAN_CHECK(sample >= 0, "sample {}", sample);
  const int64_t number = sample / kBlendSlots;
  const Slot slot = period(number)->slots[static_cast<size_t>(sample % kBlendSlots)];
  return {slot.source, number * quotas_[slot.source] + slot.rank};
}

}  // namespace capstan::data
