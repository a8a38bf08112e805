// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Simulated times against closed forms: p ranks, m micro-batches, v chunks, F forward, B input
// half, W weight half of the backward.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "capstan/base/error.h"
#include "capstan/plan/schedule.h"

namespace capstan::plan {
namespace {

Schedule build(const char* kind, int ranks, int micro_batches, int chunks = 1) {
  return build_schedule(kind, Pass::kTrain, ranks * chunks, micro_batches, chunks);
}
void expect_bubble(const Timeline& timeline, double expected, const std::string& text) {
  for (const double bubble : timeline.bubble) EXPECT_NEAR(bubble, expected, 1e-12) << text;
}

TEST(SimulateSchedule, GpipeAnd1f1bIdleForTheWayThroughThePipeline) {
  for (const char* kind : {"gpipe", "1f1b"})
    for (int p = 2; p <= 16; ++p)
      for (const int m : {1, 2, 3, 5, 8, 16, 37, 64}) {
        const Timeline t = simulate_schedule(build(kind, p, m), {});
        EXPECT_EQ(t.makespan, 3.0 * (m + p - 1)) << kind << p << " " << m;
        expect_bubble(t, (p - 1.0) / (m + p - 1.0), fmt::format("{} {} {}", kind, p, m));
      }
}

TEST(SimulateSchedule, InterleavedIdlesForOneChunkPerRank) {
  for (int v = 2; v <= 4; ++v)
    for (int p = 2; p <= 16; ++p)
      for (int m = p; m <= 64; m += p) {
        const Timeline t = simulate_schedule(build("interleaved", p, m, v), {});
        EXPECT_EQ(t.makespan, 3.0 * (v * m + p - 1)) << v << " " << p << " " << m;
        expect_bubble(t, (p - 1.0) / (v * m + p - 1.0), fmt::format("{} {} {}", v, p, m));
      }
}

// ZB-H1: m (F + B + W) + (p - 1)(F + B - W), a third of 1f1b's bubble at equal durations.
TEST(SimulateSchedule, ZeroBubbleIdlesForAThirdOf1f1b) {
  for (int p = 2; p <= 16; ++p)
    for (int m = p; m <= 64; ++m) {
      const Timeline t = simulate_schedule(build("zero_bubble", p, m), {});
      EXPECT_EQ(t.makespan, 3.0 * m + (p - 1));
      expect_bubble(t, (p - 1.0) / (3.0 * m + p - 1), fmt::format("{} {}", p, m));
    }
  for (const auto& [f, b, w] : {std::tuple{1.0, 1.1, 0.8}, {1.0, 1.0, 0.5}, {0.9, 1.2, 0.9}})
    for (const int p : {2, 4, 8, 16}) {
      const int m = 3 * p;
      const Timeline t =
          simulate_schedule(build("zero_bubble", p, m),
                            {.forward = {f}, .backward_input = {b}, .backward_weight = {w}});
      EXPECT_NEAR(t.makespan, m * (f + b + w) + (p - 1) * (f + b - w), 1e-9) << f << b << w << p;
    }
}

// ZB-V: once a rank has begun it computes without a gap, so it is occupied for exactly its work;
// only the way of the first micro-batch to the last rank, p - 1 chunks, is left of the bubble.
TEST(SimulateSchedule, ZeroBubbleVeeHasNoGaps) {
  for (int p = 2; p <= 16; ++p)
    for (int m = 2 * p; m <= 64; ++m) {
      const Timeline t = simulate_schedule(build("zero_bubble", p, m, 2), {});
      EXPECT_EQ(t.makespan, 6.0 * m + p - 1) << p << " " << m;
      for (const double occupied : t.occupied) EXPECT_EQ(occupied, 6.0 * m) << p << " " << m;
      expect_bubble(t, (p - 1.0) / (6.0 * m + p - 1), fmt::format("{} {}", p, m));
    }
}

// Below 2p micro-batches ZB-V has gaps, but it is still ahead of 1f1b with stages of twice the
// size.
TEST(SimulateSchedule, ShortZeroBubbleVeeBeats1f1b) {
  for (int p = 2; p <= 16; ++p)
    for (int m = 1; m < 2 * p; ++m)
      EXPECT_LE(simulate_schedule(build("zero_bubble", p, m, 2), {}).makespan,
                2 * simulate_schedule(build("1f1b", p, m), {}).makespan)
          << p << " " << m;
}

// Forward passes idle for the way to the last rank (and back, where stages turn there) only.
TEST(SimulateSchedule, ForwardPassesFillThePipelineOnce) {
  for (int p = 1; p <= 16; ++p)
    for (const int m : {1, 2, 7, 16, 40}) {
      const auto makespan = [&](const char* kind, int micro_batches, int chunks) {
        return simulate_schedule(
                   build_schedule(kind, Pass::kForwardOnly, p * chunks, micro_batches, chunks), {})
            .makespan;
      };
      for (const char* kind : {"gpipe", "1f1b", "zero_bubble"})
        EXPECT_EQ(makespan(kind, m, 1), m + p - 1) << kind << " " << p << " " << m;
      EXPECT_EQ(makespan("zero_bubble", m, 2), 2 * m + 2 * p - 2) << p << " " << m;
      EXPECT_EQ(makespan("interleaved", p * m, 3), 3 * p * m + p - 1) << p << " " << m;
    }
}

TEST(SimulateSchedule, OneRankNeverIdles) {
  for (const auto& [kind, chunks] : {std::pair{"gpipe", 1},
                                     {"1f1b", 1},
                                     {"interleaved", 3},
                                     {"zero_bubble", 1},
                                     {"zero_bubble", 2}}) {
    const Timeline t = simulate_schedule(build(kind, 1, 5, chunks), {});
    EXPECT_EQ(t.makespan, 15 * chunks) << kind;
    EXPECT_EQ(t.bubble.at(0), 0) << kind;
  }
}

TEST(SimulateSchedule, TransfersDelayTheirReceiver) {
  // F0 > F0 B0 > B0: two transfers on the critical path.
  const Schedule schedule = build("gpipe", 2, 1);
  const Timeline t = simulate_schedule(schedule, {.transfer = 0.25});
  EXPECT_EQ(t.makespan, 6.5);
  // Rank 1: R0 F0 B0 s0; the receive lasts until the activation arrives.
  EXPECT_EQ(t.spans[1][0].start, 0);
  EXPECT_EQ(t.spans[1][0].end, 1.25);
  EXPECT_EQ(t.spans[1][1].end, 2.25);
  EXPECT_EQ(t.spans[1][3].start, 4.25);
  EXPECT_EQ(t.spans[1][3].end, 4.25);
  EXPECT_EQ(t.spans[0][2].end, 4.5);
  // A channel carries one transfer at a time: with transfers of 3 the forwards arrive at 4, 7, 10.
  const Timeline slow =
      simulate_schedule(build_schedule("gpipe", Pass::kForwardOnly, 2, 3, 1), {.transfer = 3});
  EXPECT_EQ(slow.makespan, 11);
}

TEST(SimulateSchedule, UnevenStagesWaitForTheSlowest) {
  const Schedule schedule = build("gpipe", 3, 20);
  const Timeline t = simulate_schedule(
      schedule, {.forward = {1, 2, 1}, .backward_input = {1, 2, 1}, .backward_weight = {1, 2, 1}});
  EXPECT_EQ(t.makespan, 20 * 6 + 3 + 3);  // the slow stage, then one pass of each other stage
  EXPECT_EQ(t.busy[0], 60);
  EXPECT_EQ(t.busy[1], 120);
  EXPECT_NEAR(t.bubble[1], 6.0 / 126, 1e-12);
}

// Grouping exists for transports without buffers and must not cost time: moving every receive back
// to its use and issuing everything alone is no faster.
Schedule with_late_receives(Schedule schedule) {
  for (auto& list : schedule.ranks) {
    std::vector<Instruction> late, held;
    for (const Instruction& i : list) {
      if (is_receive(i.op)) {
        held.push_back(i);
        continue;
      }
      const auto use = std::find_if(held.begin(), held.end(), [&](const Instruction& h) {
        const bool fits = h.op == Op::kReceiveActivation
                              ? i.op == Op::kForward
                              : i.op == Op::kBackward || i.op == Op::kBackwardInput;
        return fits && h.chunk == i.chunk && h.micro_batch == i.micro_batch;
      });
      if (use != held.end()) {
        late.push_back(*use);
        held.erase(use);
      }
      late.push_back(i);
    }
    for (size_t i = 0; i < late.size(); ++i) late[i].group = static_cast<int>(i);
    list = late;
  }
  return schedule;
}

TEST(SimulateSchedule, GroupsCostNoTime) {
  for (const auto& [kind, chunks] : {std::pair{"gpipe", 1},
                                     {"1f1b", 1},
                                     {"interleaved", 2},
                                     {"interleaved", 4},
                                     {"zero_bubble", 1},
                                     {"zero_bubble", 2}})
    for (const int p : {2, 3, 4, 8})
      for (const double transfer : {0.0, 0.05, 0.3}) {
        const Schedule schedule = build(kind, p, 4 * p, chunks);
        EXPECT_NEAR(
            simulate_schedule(schedule, {.transfer = transfer}).makespan,
            simulate_schedule(with_late_receives(schedule), {.transfer = transfer}).makespan, 1e-9)
            << kind << " " << chunks << " " << p << " " << transfer;
      }
}

TEST(SimulateSchedule, ComputationsOfARankDoNotOverlap) {
  const Schedule schedule = build("interleaved", 4, 8, 3);
  const Timeline t = simulate_schedule(schedule, {.forward = {1.3}, .transfer = 0.1});
  for (size_t rank = 0; rank < 4; ++rank)
    for (size_t i = 1; i < t.spans[rank].size(); ++i)
      EXPECT_GE(t.spans[rank][i].end, t.spans[rank][i - 1].start);
  for (size_t rank = 0; rank < 4; ++rank) EXPECT_NEAR(t.busy[rank], 8 * 3 * (1.3 + 1 + 1), 1e-9);
}

TEST(SimulateSchedule, WhatCannotRunIsRefused) {
  const Schedule good = build("gpipe", 2, 2);
  EXPECT_THROW((void)simulate_schedule(good, {.forward = {1, 2, 3}}), InternalError);
  EXPECT_THROW((void)simulate_schedule(good, {.forward = {}}), InternalError);
  EXPECT_THROW((void)simulate_schedule(good, {.forward = {-1}}), InternalError);
  EXPECT_THROW((void)simulate_schedule(good, {.transfer = -1}), InternalError);
  Schedule bad = good;
  bad.ranks[0].erase(bad.ranks[0].begin() + 1);  // the first send
  EXPECT_THROW((void)simulate_schedule(bad, {}), InternalError);
}

}  // namespace
}  // namespace capstan::plan
