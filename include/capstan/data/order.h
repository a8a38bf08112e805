// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which row of which file is sample number s: a pure function of the seed, the sizes and s, so
// resuming is a number and the count of ranks never matters. All classes are immutable and
// thread-safe, BlendOrder's cache included.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

namespace capstan::data {

// A keyed bijection of [0, size): an unbalanced Feistel network over the bits of size - 1, walked
// until the value falls below size (fewer than two passes on average). O(1) time and memory.
class Permutation {
 public:
  Permutation(int64_t size, uint64_t key);
  [[nodiscard]] int64_t operator()(int64_t index) const;
  [[nodiscard]] int64_t size() const { return size_; }

 private:
  [[nodiscard]] uint64_t mix(uint64_t value) const;
  int64_t size_;
  uint64_t key_;
  int low_bits_, high_bits_;
};

// How many of `slots` each weight gets: proportional, rounded by largest remainder (ties: the
// earlier one).
[[nodiscard]] std::vector<int64_t> largest_remainder(std::span<const double> weights,
                                                     int64_t slots);

// Number of samples before a step. Constant batch today; a warm-up of the batch replaces only this
// class.
class StepSchedule {
 public:
  explicit StepSchedule(int64_t global_samples);
  [[nodiscard]] int64_t samples_before(int64_t step) const;
  [[nodiscard]] int64_t samples_in(int64_t step) const;
  // First step whose samples do not lie wholly before `sample`.
  [[nodiscard]] int64_t step_of(int64_t sample) const;

 private:
  int64_t global_samples_;
};

// Half-open part of the samples of one step that belongs to `index` of `parts` equal shares; when
// the count does not divide, the first shares hold one more.
struct SampleRange {
  int64_t first = 0, count = 0;
};
[[nodiscard]] SampleRange share_of(SampleRange all, int64_t index, int64_t parts);

// Slots of one blend period: the source of each, and how many earlier slots of the period have that
// source.
inline constexpr int64_t kBlendSlots = int64_t{1} << 16;

class BlendOrder {
 public:
  // Throws ConfigError for a weight that is not positive or too small for one slot in 65,536.
  BlendOrder(std::vector<double> weights, uint64_t seed);
  struct Place {
    int64_t source = 0;
    int64_t ordinal = 0;  // how many earlier samples came from this source
  };
  [[nodiscard]] Place operator()(int64_t sample) const;
  [[nodiscard]] const std::vector<int64_t>& quotas() const { return quotas_; }

 private:
  struct Slot {
    uint32_t source, rank;
  };
  struct Period {
    int64_t number;
    std::vector<Slot> slots;
  };
  [[nodiscard]] std::shared_ptr<const Period> period(int64_t number) const;
  [[nodiscard]] std::shared_ptr<const Period> build_period(int64_t number) const;

  uint64_t seed_;
  std::vector<int64_t> quotas_;
  mutable std::mutex mutex_;
  mutable std::array<std::shared_ptr<const Period>, 2> recent_;
};

struct SourceSize {
  int64_t rows = 0;
  double weight = 1;
};

class SampleOrder {
 public:
  // Without shuffle the rows of each source come in file order; blends still interleave their
  // sources.
  SampleOrder(std::vector<SourceSize> sources, uint64_t seed, bool shuffle);
  struct Place {
    int64_t source = 0, epoch = 0, row = 0;
  };
  [[nodiscard]] Place operator()(int64_t sample) const;
  [[nodiscard]] int64_t rows() const;  // of all sources

 private:
  std::vector<SourceSize> sources_;
  uint64_t seed_;
  bool shuffle_;
  std::unique_ptr<BlendOrder> blend_;  // none for one source
};

}  // namespace capstan::data
