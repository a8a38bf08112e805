// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/order.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <string>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/philox.h"

namespace capstan::data {
namespace {

constexpr uint32_t kRounds = 8;  // half rounds: each changes one side

}  // namespace

Permutation::Permutation(int64_t size, uint64_t key) : size_(size), key_(key) {
  CAPSTAN_CHECK(size > 0, "a permutation of {} elements", size);
  const int bits = std::bit_width(static_cast<uint64_t>(size) - 1);
  low_bits_ = (bits + 1) / 2;
  high_bits_ = bits / 2;
}

uint64_t Permutation::mix(uint64_t value) const {
  const philox::Key key = {static_cast<uint32_t>(key_), static_cast<uint32_t>(key_ >> 32)};
  const auto draw = [&](uint64_t side, uint32_t round) {
    const philox::Counter bits = philox::block(
        {static_cast<uint32_t>(side), static_cast<uint32_t>(side >> 32), round, 0}, key);
    return bits[0] | uint64_t{bits[1]} << 32;
  };
  const uint64_t low_mask = (uint64_t{1} << low_bits_) - 1,
                 high_mask = (uint64_t{1} << high_bits_) - 1;
  uint64_t low = value & low_mask, high = value >> low_bits_;
  for (uint32_t round = 0; round < kRounds; round += 2) {
    low ^= draw(high, round) & low_mask;
    high ^= draw(low, round + 1) & high_mask;
  }
  return high << low_bits_ | low;
}

int64_t Permutation::operator()(int64_t index) const {
  CAPSTAN_CHECK(index >= 0 && index < size_, "index {} of {}", index, size_);
  auto value = static_cast<uint64_t>(index);
  do {
    value = mix(value);
  } while (value >= static_cast<uint64_t>(size_));
  return static_cast<int64_t>(value);
}

StepSchedule::StepSchedule(int64_t global_samples) : global_samples_(global_samples) {
  CAPSTAN_CHECK(global_samples > 0, "{} samples per step", global_samples);
}
int64_t StepSchedule::samples_before(int64_t step) const { return step * global_samples_; }
int64_t StepSchedule::samples_in(int64_t /*step*/) const { return global_samples_; }
int64_t StepSchedule::step_of(int64_t sample) const { return sample / global_samples_; }

SampleRange share_of(SampleRange all, int64_t index, int64_t parts) {
  CAPSTAN_CHECK(index >= 0 && index < parts, "share {} of {}", index, parts);
  const int64_t whole = all.count / parts, rest = all.count % parts;
  return {all.first + index * whole + std::min(index, rest), whole + (index < rest ? 1 : 0)};
}

SampleOrder::SampleOrder(std::vector<SourceSize> sources, uint64_t seed, bool shuffle)
    : sources_(std::move(sources)), seed_(seed), shuffle_(shuffle) {
  CAPSTAN_CHECK(!sources_.empty(), "no source");
  for (const SourceSize& source : sources_)
    CAPSTAN_CHECK(source.rows > 0, "a source of {} rows", source.rows);
  if (sources_.size() == 1) return;
  std::vector<double> weights;
  for (const SourceSize& source : sources_) weights.push_back(source.weight);
  blend_ = std::make_unique<BlendOrder>(std::move(weights), seed);
}

SampleOrder::Place SampleOrder::operator()(int64_t sample) const {
  CAPSTAN_CHECK(sample >= 0, "sample {}", sample);
  const BlendOrder::Place slot = blend_ ? (*blend_)(sample) : BlendOrder::Place{0, sample};
  const int64_t rows = sources_[static_cast<size_t>(slot.source)].rows;
  Place place{slot.source, slot.ordinal / rows, slot.ordinal % rows};
  if (shuffle_) {
    const uint64_t stream = philox::stream_of("data.rows", std::to_string(slot.source));
    place.row = Permutation(
        rows, philox::bits64(seed_, stream, static_cast<uint64_t>(place.epoch)))(place.row);
  }
  return place;
}

int64_t SampleOrder::rows() const {
  return std::accumulate(sources_.begin(), sources_.end(), int64_t{0},
                         [](int64_t sum, const SourceSize& source) { return sum + source.rows; });
}

}  // namespace capstan::data
