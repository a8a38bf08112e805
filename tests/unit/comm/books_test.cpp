// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "capstan/comm/flight_recorder.h"
#include "capstan/comm/ledger.h"

namespace capstan::comm {
namespace {

TEST(Ledger, AddsPerAxisAndOperation) {
  Ledger ledger;
  ledger.add("dp", "all_reduce", 100);
  ledger.add("dp", "all_reduce", 50);
  ledger.add("control", "barrier", 0);
  ledger.add("tp", "all_gather", 7);
  EXPECT_EQ(ledger.of("dp", "all_reduce"), (Traffic{2, 150}));
  EXPECT_EQ(ledger.of("pp", "send"), Traffic{});
  EXPECT_EQ(ledger.total(), (Traffic{3, 157}));
  EXPECT_EQ(ledger.table().size(), 3U);
  ledger.reset();
  EXPECT_EQ(ledger.total(), Traffic{});
}

TEST(FlightRecorder, KeepsTheLastThousandInOrder) {
  FlightRecorder recorder;
  EXPECT_EQ(recorder.last_text(), "none");
  int64_t first = -1;
  for (int64_t i = 0; i < 2500; ++i) {
    const int64_t id = recorder.add({.axis = "dp[0,1]", .sequence = i, .what = "barrier"});
    if (i == 0) first = id;
    recorder.begin(id);
    if (i != 2400) recorder.end(id, i != 2499);
  }
  recorder.end(first, false);  // long overwritten: ignored
  const auto flights = recorder.flights();
  ASSERT_EQ(flights.size(), 1000U);
  EXPECT_EQ(flights.front().sequence, 1500);
  EXPECT_EQ(flights.back().sequence, 2499);
  EXPECT_EQ(flights.front().state, Flight::State::kDone);
  EXPECT_EQ(recorder.last_text(), "barrier #2499 on dp[0,1]: failed");
  EXPECT_EQ(recorder.open_text(), "barrier #2400 on dp[0,1]: running");
}

TEST(FlightRecorder, ManyOpenOperations_AreShortened) {
  FlightRecorder recorder;
  for (int64_t i = 0; i < 6; ++i)
    recorder.add({.axis = "dp[0,1]", .sequence = i, .what = "barrier"});
  EXPECT_EQ(recorder.open_text(2),
            "barrier #0 on dp[0,1]: issued, barrier #1 on dp[0,1]: issued, ...");
}

}  // namespace
}  // namespace capstan::comm
