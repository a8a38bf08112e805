// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/prefetcher.h"

#include <gmock/gmock.h>

#include <future>

#include "capstan/base/log.h"
#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::HasSubstr;

SampleBatch batch_of(int64_t step) {
  SampleBatch batch = make_batch(1, 2);
  batch.global_sample[0] = step;
  return batch;
}

TEST(Prefetcher, GivesTheStepsInOrder) {
  Prefetcher prefetcher(batch_of, {.first_step = 7, .end_step = 20, .depth = 3});
  for (int64_t step = 7; step < 20; ++step) {
    EXPECT_EQ(prefetcher.step(), step);
    EXPECT_EQ(prefetcher.next().global_sample[0], step);
    EXPECT_GE(prefetcher.wait_ms(), 0);
  }
  EXPECT_THROW((void)prefetcher.next(), InternalError);
}

TEST(Prefetcher, ReadsAheadNoFurtherThanDepth) {
  std::promise<void> two_read;
  std::atomic<int64_t> reads{0};
  Prefetcher prefetcher(
      [&](int64_t step) {
        if (++reads == 2) two_read.set_value();
        return batch_of(step);
      },
      {.depth = 2});
  two_read.get_future().wait();
  EXPECT_EQ(reads, 2);
  (void)prefetcher.next();
  (void)prefetcher.next();
  EXPECT_LE(reads, 4);
}

TEST(Prefetcher, ErrorSurfacesAtItsStep_AndStays) {
  Prefetcher prefetcher(
      [](int64_t step) {
        if (step == 2) throw DataError(std::string("step two is broken"));
        return batch_of(step);
      },
      {.depth = 4});
  EXPECT_EQ(prefetcher.next().global_sample[0], 0);
  EXPECT_EQ(prefetcher.next().global_sample[0], 1);
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(message_of<DataError>([&] { (void)prefetcher.next(); }), HasSubstr("step two"));
  }
}

TEST(Prefetcher, DeadlineNamesTheStep) {
  std::promise<void> release;
  std::shared_future<void> gate = release.get_future().share();
  Prefetcher prefetcher(
      [gate](int64_t step) {
        if (step == 1) gate.wait();
        return batch_of(step);
      },
      {.depth = 1, .timeout_s = 0.05});
  EXPECT_EQ(prefetcher.next().global_sample[0], 0);
  EXPECT_THAT(message_of<EnvError>([&] { (void)prefetcher.next(); }),
              HasSubstr("samples of step 1"));
  release.set_value();
}

TEST(Prefetcher, DestroyedWhileFull_Joins) {
  for (int i = 0; i < 20; ++i) Prefetcher prefetcher(batch_of, {.depth = 1});
}

TEST(Prefetcher, ThreadCarriesTheRank) {
  log::set_thread_rank(3);
  std::promise<int> rank;
  {
    Prefetcher prefetcher(
        [&](int64_t step) {
          if (step == 0) rank.set_value(log::thread_rank());
          return batch_of(step);
        },
        {.depth = 1});
    EXPECT_EQ(rank.get_future().get(), 3);
  }
  log::set_thread_rank(-1);
}

}  // namespace
}  // namespace capstan::data
