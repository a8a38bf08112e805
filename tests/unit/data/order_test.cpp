// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/order.h"

#include <gmock/gmock.h>

#include <cmath>
#include <set>
#include <thread>

#include "capstan/base/philox.h"
#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Permutation, IsABijection_ForManySizesAndKeys) {
  std::vector<int64_t> sizes = {1,   2,    3,    5,    7,     255,   256,
                                257, 1000, 4095, 4097, 65536, 65537, 100003};
  for (int64_t size = 8; size < 70; ++size) sizes.push_back(size);
  for (const int64_t size : sizes) {
    for (const uint64_t key : {uint64_t{0}, uint64_t{1}, uint64_t{0xdeadbeefcafef00d}}) {
      const Permutation permutation(size, key);
      std::vector<bool> seen(static_cast<size_t>(size), false);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t value = permutation(i);
        ASSERT_GE(value, 0);
        ASSERT_LT(value, size);
        ASSERT_FALSE(seen[static_cast<size_t>(value)]) << size << " " << key << " " << i;
        seen[static_cast<size_t>(value)] = true;
      }
    }
  }
}

TEST(Permutation, HugeSizes_StayInRangeWithoutRepeats) {
  for (const int64_t size : {(int64_t{1} << 40) + 12345, int64_t{1} << 62, INT64_MAX}) {
    const Permutation permutation(size, 99);
    std::set<int64_t> seen;
    for (int64_t i = 0; i < 2000; ++i) {
      const int64_t value = permutation(i);
      ASSERT_TRUE(value >= 0 && value < size);
      ASSERT_TRUE(seen.insert(value).second);
    }
  }
}

// Every element must reach every place equally often over many keys: chi-square with 9 degrees of
// freedom per element, 27.88 is exceeded once in 1,000; the sum of ten over 90 degrees stays below
// 145 but once in 5,000.
TEST(Permutation, PlacesAreUniformOverKeys) {
  constexpr int kSize = 10, kKeys = 20000;
  std::array<std::array<int, kSize>, kSize> counts{};
  for (uint64_t key = 0; key < kKeys; ++key) {
    const Permutation permutation(kSize, philox::bits64(1, 2, key));
    for (int i = 0; i < kSize; ++i) ++counts[size_t(i)][size_t(permutation(i))];
  }
  double sum = 0;
  for (const auto& row : counts) {
    for (const int count : row) {
      const double expected = double(kKeys) / kSize;
      sum += (count - expected) * (count - expected) / expected;
    }
  }
  EXPECT_LT(sum, 145);
}

TEST(Permutation, NeighboursAreUnrelated) {
  constexpr int64_t kSize = 50000;
  const Permutation permutation(kSize, 5);
  double sum = 0;
  int64_t successors = 0;
  for (int64_t i = 0; i + 1 < kSize; ++i) {
    const double a = double(permutation(i)) / kSize - 0.5,
                 b = double(permutation(i + 1)) / kSize - 0.5;
    sum += a * b;
    successors += permutation(i + 1) == permutation(i) + 1 ? 1 : 0;
  }
  // Correlation of independent uniforms over n pairs has deviation 1 / sqrt(n).
  EXPECT_LT(std::abs(sum * 12 / kSize), 4 / std::sqrt(double(kSize)));
  EXPECT_LE(successors, 8);  // one expected
}

TEST(Permutation, ValuesStayTheSameForEver) {
  const Permutation permutation(1000, 42);
  std::vector<int64_t> first;
  for (int64_t i = 0; i < 6; ++i) first.push_back(permutation(i));
  EXPECT_THAT(first, ElementsAre(913, 445, 158, 300, 492, 817));
}

TEST(LargestRemainder, SumsToTheSlots) {
  const std::vector<double> thirds = {1, 1, 1};
  EXPECT_THAT(largest_remainder(thirds, 10), ElementsAre(4, 3, 3));
  const std::vector<double> mixed = {0.5, 0.3, 0.2};
  EXPECT_THAT(largest_remainder(mixed, 65536), ElementsAre(32768, 19661, 13107));
  const std::vector<double> scaled = {5e9, 3e9, 2e9};
  EXPECT_THAT(largest_remainder(scaled, 65536), ElementsAre(32768, 19661, 13107));
}

TEST(BlendOrder, EveryPeriodHoldsExactlyTheQuotas) {
  const BlendOrder blend({0.7, 0.2, 0.1}, 11);
  for (const int64_t period : {0, 1, 5}) {
    std::vector<int64_t> counts(3);
    for (int64_t i = 0; i < kBlendSlots; ++i) {
      const BlendOrder::Place place = blend(period * kBlendSlots + i);
      const auto source = static_cast<size_t>(place.source);
      // Ordinals of a source count up by one, over the border of periods too.
      ASSERT_EQ(place.ordinal, period * blend.quotas()[source] + counts[source]);
      ++counts[source];
    }
    EXPECT_EQ(counts, blend.quotas());
  }
}

TEST(BlendOrder, PeriodsDiffer_AndStartsAreMixed) {
  const BlendOrder blend({0.5, 0.5}, 11);
  int64_t same = 0, first_source = 0;
  for (int64_t i = 0; i < 4096; ++i) {
    same += blend(i).source == blend(i + kBlendSlots).source ? 1 : 0;
    first_source += blend(i).source == 0 ? 1 : 0;
  }
  EXPECT_NEAR(double(same), 2048, 160);
  EXPECT_NEAR(double(first_source), 2048, 160);
}

TEST(BlendOrder, BadWeights_AreNamed) {
  EXPECT_THAT(message_of<ConfigError>([] {
                BlendOrder({1.0, 0.0}, 1);
              }),
              HasSubstr("data.train[1].weight"));
  EXPECT_THAT(message_of<ConfigError>([] {
                BlendOrder({-1.0, 1.0}, 1);
              }),
              HasSubstr("data.train[0].weight"));
  EXPECT_THAT(message_of<ConfigError>([] {
                BlendOrder({1.0, std::nan("")}, 1);
              }),
              HasSubstr("above 0"));
  EXPECT_THAT(message_of<ConfigError>([] { BlendOrder({1.0, 1e-9}, 1); }), HasSubstr("1/65536"));
}

TEST(SampleOrder, EveryEpochVisitsEveryRowOnce) {
  const SampleOrder order({{37, 1.0}}, 3, true);
  std::vector<std::vector<int64_t>> epochs(3);
  for (int64_t sample = 0; sample < 3 * 37; ++sample) {
    const SampleOrder::Place place = order(sample);
    EXPECT_EQ(place.epoch, sample / 37);
    epochs[static_cast<size_t>(place.epoch)].push_back(place.row);
  }
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
  for (auto& rows : epochs) {
    std::sort(rows.begin(), rows.end());
    for (int64_t i = 0; i < 37; ++i) EXPECT_EQ(rows[static_cast<size_t>(i)], i);
  }
}

TEST(SampleOrder, WithoutShuffle_FileOrder) {
  const SampleOrder order({{5, 1.0}}, 3, false);
  for (int64_t sample = 0; sample < 12; ++sample) EXPECT_EQ(order(sample).row, sample % 5);
}

TEST(SampleOrder, BlendVisitsRowsOncePerEpochOfTheirSource) {
  const SampleOrder order({{100, 3.0}, {7, 1.0}}, 9, true);
  std::vector<std::vector<int>> visits = {std::vector<int>(100), std::vector<int>(7)};
  for (int64_t sample = 0; sample < kBlendSlots; ++sample) {
    const SampleOrder::Place place = order(sample);
    ++visits[static_cast<size_t>(place.source)][static_cast<size_t>(place.row)];
  }
  for (const auto& source : visits) {
    const auto [least, most] = std::minmax_element(source.begin(), source.end());
    EXPECT_LE(*most - *least, 1);
  }
}

TEST(SampleOrder, SeedAndSourceDecideTheOrder) {
  const SampleOrder a({{1000, 1.0}, {1000, 1.0}}, 1, true), b({{1000, 1.0}, {1000, 1.0}}, 2, true);
  std::array<std::vector<int64_t>, 2> rows_of_source;
  int64_t same = 0;
  for (int64_t sample = 0; sample < 2000; ++sample) {
    same += a(sample).row == b(sample).row ? 1 : 0;
    rows_of_source[static_cast<size_t>(a(sample).source)].push_back(a(sample).row);
  }
  EXPECT_LT(same, 20);
  EXPECT_NE(rows_of_source[0].front(), rows_of_source[1].front());
}

// Threads that want more periods than the cache holds still get their own period.
TEST(SampleOrder, ThreadsSeeTheSameOrder) {
  const auto sizes = [] { return std::vector<SourceSize>{{1000, 2.0}, {500, 1.0}}; };
  const SampleOrder reference(sizes(), 4, true), shared(sizes(), 4, true);
  constexpr int64_t kPeriods = 4, kSamples = 20;
  const auto sample_of = [](int64_t period, int64_t i) { return kBlendSlots * period + i * 997; };
  std::vector<SampleOrder::Place> expected;
  for (int64_t period = 0; period < kPeriods; ++period) {
    for (int64_t i = 0; i < kSamples; ++i) expected.push_back(reference(sample_of(period, i)));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int64_t period = 0; period < kPeriods; ++period) {
    threads.emplace_back([&, period] {
      for (int64_t i = 0; i < kSamples; ++i) {
        const SampleOrder::Place place = shared(sample_of(period, i));
        const SampleOrder::Place& want = expected[static_cast<size_t>(period * kSamples + i)];
        if (place.source != want.source || place.row != want.row || place.epoch != want.epoch)
          ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(StepSchedule, IsCumulative) {
  const StepSchedule schedule(8);
  EXPECT_EQ(schedule.samples_before(0), 0);
  EXPECT_EQ(schedule.samples_before(900), 7200);
  for (int64_t step = 0; step < 5; ++step) {
    EXPECT_EQ(schedule.samples_before(step) + schedule.samples_in(step),
              schedule.samples_before(step + 1));
  }
  EXPECT_EQ(schedule.step_of(7), 0);
  EXPECT_EQ(schedule.step_of(8), 1);
}

TEST(ShareOf, PartsFollowWithoutGap) {
  for (const int64_t parts : {1, 2, 3, 4, 7}) {
    int64_t next = 100;
    for (int64_t i = 0; i < parts; ++i) {
      const SampleRange range = share_of({100, 10}, i, parts);
      EXPECT_EQ(range.first, next);
      EXPECT_GE(range.count, 10 / parts);
      EXPECT_LE(range.count, 10 / parts + 1);
      next += range.count;
    }
    EXPECT_EQ(next, 110);
  }
}

}  // namespace
}  // namespace capstan::data
