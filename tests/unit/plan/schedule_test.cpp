// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "capstan/base/error.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;

Schedule gpipe(int stages, int micro_batches, Pass pass = Pass::kTrain) {
  return build_schedule("gpipe", pass, stages, micro_batches, 1);
}

std::vector<Op> ops_of(const Schedule& schedule, size_t rank) {
  std::vector<Op> ops;
  for (const Instruction& i : schedule.ranks[rank]) ops.push_back(i.op);
  return ops;
}

std::string all(const std::vector<std::string>& problems) {
  std::string text;
  for (const std::string& problem : problems) text += problem + "\n";
  return text;
}

TEST(Schedule, GpipeIsLegalForEverySize) {
  for (const Pass pass : {Pass::kTrain, Pass::kForwardOnly, Pass::kDecode})
    for (int stages = 1; stages <= 5; ++stages)
      for (int micro_batches = 1; micro_batches <= 6; ++micro_batches) {
        const Schedule schedule = gpipe(stages, micro_batches, pass);
        EXPECT_EQ(schedule.ranks.size(), static_cast<size_t>(stages));
        EXPECT_EQ(all(check_schedule(schedule)), "")
            << stages << " stages, " << micro_batches << " micro-batches";
      }
}

TEST(Schedule, OneStageRunsMicroBatchesOneByOne) {
  const Schedule schedule = gpipe(1, 3);
  EXPECT_EQ(ops_of(schedule, 0),
            (std::vector<Op>{Op::kForward, Op::kBackward, Op::kForward, Op::kBackward, Op::kForward,
                             Op::kBackward, Op::kReduce, Op::kStep}));
  EXPECT_EQ(peak_in_flight(schedule, 0), 1);
  EXPECT_EQ(peak_in_flight(gpipe(3, 4), 0), 4);
  EXPECT_EQ(peak_in_flight(gpipe(3, 4, Pass::kForwardOnly), 0), 1);
}

TEST(Schedule, StagesExchangeActivationsAndGradients) {
  const Schedule schedule = gpipe(3, 2);
  // The last gradient goes out before the reduction begins, so that the stage before need not wait
  // for it.
  EXPECT_EQ(
      ops_of(schedule, 1),
      (std::vector<Op>{Op::kReceiveActivation, Op::kForward, Op::kSendActivation,
                       Op::kReceiveActivation, Op::kForward, Op::kSendActivation,
                       Op::kReceiveGradient, Op::kBackward, Op::kSendGradient, Op::kReceiveGradient,
                       Op::kBackward, Op::kSendGradient, Op::kReduce, Op::kStep}));
  EXPECT_EQ(schedule.ranks[1][0].peer, 0);
  EXPECT_EQ(schedule.ranks[1][2].peer, 2);
}

TEST(Schedule, DecodeHasNoBackward) {
  for (const Op op : ops_of(gpipe(2, 2, Pass::kDecode), 0))
    EXPECT_TRUE(op == Op::kForward || op == Op::kSendActivation);
}

TEST(Schedule, KindsOfLaterWorkAreRefusedByName) {
  for (const char* kind : {"1f1b", "interleaved", "zero_bubble"}) {
    try {
      (void)build_schedule(kind, Pass::kTrain, 2, 2, 1);
      FAIL();
    } catch (const ConfigError& e) {
      EXPECT_THAT(e.what(), HasSubstr(std::string("'") + kind + "', which is not in this build"));
      EXPECT_THAT(e.what(), HasSubstr("gpipe"));
    }
  }
  EXPECT_THROW((void)build_schedule("gpip", Pass::kTrain, 2, 2, 1), ConfigError);
  EXPECT_THROW((void)build_schedule("gpipe", Pass::kTrain, 4, 2, 2), ConfigError);
  EXPECT_THROW((void)build_schedule("gpipe", Pass::kTrain, 0, 2, 1), InternalError);
}

// Removing, repeating or swapping any instruction that carries meaning must be noticed.
TEST(CheckSchedule, NoticesEveryMissingAndRepeatedInstruction) {
  for (const Schedule& good : {gpipe(1, 2), gpipe(3, 3)})
    for (size_t rank = 0; rank < good.ranks.size(); ++rank)
      for (size_t i = 0; i < good.ranks[rank].size(); ++i) {
        Schedule missing = good;
        missing.ranks[rank].erase(missing.ranks[rank].begin() + static_cast<long>(i));
        EXPECT_FALSE(check_schedule(missing).empty())
            << "without " << name_of(good.ranks[rank][i].op) << " " << i;
        Schedule repeated = good;
        repeated.ranks[rank].insert(repeated.ranks[rank].begin() + static_cast<long>(i),
                                    good.ranks[rank][i]);
        EXPECT_FALSE(check_schedule(repeated).empty())
            << "twice " << name_of(good.ranks[rank][i].op) << " " << i;
      }
}

TEST(CheckSchedule, NoticesAWrongOrder) {
  Schedule schedule = gpipe(2, 2);
  auto& list = schedule.ranks[1];  // R F R F B S B S reduce step
  std::swap(list[0], list[2]);
  EXPECT_THAT(all(check_schedule(schedule)), HasSubstr("order of receives differs"));
  schedule = gpipe(1, 2);
  std::swap(schedule.ranks[0][0], schedule.ranks[0][1]);
  EXPECT_THAT(all(check_schedule(schedule)), HasSubstr("its forward was not run"));
  schedule = gpipe(2, 1);
  std::swap(schedule.ranks[1][0], schedule.ranks[1][1]);
  EXPECT_THAT(all(check_schedule(schedule)), HasSubstr("its input was not received"));
}

TEST(CheckSchedule, NoticesDeadlockUnderRendezvousSends) {
  // Both ranks send first and receive second: buffered sends would hide it.
  Schedule schedule = gpipe(2, 2);
  auto& first = schedule.ranks[0];   // F0 S0 F1 S1 r0 B0 r1 B1 ...
  auto& second = schedule.ranks[1];  // R0 F0 R1 F1 B0 s0 B1 s1 ...
  // Rank 1 sends the gradient of 0 before it receives activation 1, while rank 0 sends activation 1
  // first.
  const Instruction b0 = second[4], s0 = second[5];
  second.erase(second.begin() + 4, second.begin() + 6);
  second.insert(second.begin() + 2, {b0, s0});
  const std::string problems = all(check_schedule(schedule));
  EXPECT_THAT(problems, HasSubstr("deadlock"));
  // Issued together on rank 0 (equal group), the same order is legal.
  const auto send = std::find_if(first.begin(), first.end(), [](const Instruction& i) {
    return i.op == Op::kSendActivation && i.micro_batch == 1;
  });
  const auto receive = std::find_if(first.begin(), first.end(), [](const Instruction& i) {
    return i.op == Op::kReceiveGradient && i.micro_batch == 0;
  });
  receive->group = send->group;
  EXPECT_EQ(all(check_schedule(schedule)), "");
}

TEST(CheckSchedule, NoticesWrongPeersAndPlaces) {
  Schedule schedule = gpipe(3, 1);
  schedule.ranks[0][1].peer = 2;
  EXPECT_THAT(all(check_schedule(schedule)), HasSubstr("peer is 2"));
  schedule = gpipe(2, 1);
  schedule.ranks[0][0].chunk = 1;
  EXPECT_THAT(all(check_schedule(schedule)), HasSubstr("outside the schedule"));
  schedule = gpipe(2, 1);
  schedule.rank_of = {0, 0};
  EXPECT_FALSE(check_schedule(schedule).empty());
  schedule = gpipe(2, 2);  // the reduction before the last backward
  auto& list = schedule.ranks[0];
  const auto reduce = std::find_if(list.begin(), list.end(),
                                   [](const Instruction& i) { return i.op == Op::kReduce; });
  std::swap(*reduce, *(reduce - 1));
  EXPECT_THAT(all(check_schedule(schedule)), HasSubstr("not final"));
}

TEST(Schedule, DrawingNamesEachStep) {
  EXPECT_EQ(draw_schedule(gpipe(1, 2)), "rank 0 | F0 B0 F1 B1 reduce step\n");
  EXPECT_EQ(draw_schedule(gpipe(2, 1)),
            "rank 0 | F0 >1 1< B0 reduce step\nrank 1 | 0> F0 B0 <0 reduce step\n");
  const std::string drawing = draw_schedule(gpipe(1, 100), 60);
  EXPECT_THAT(drawing, HasSubstr(" ... "));
  EXPECT_THAT(drawing, HasSubstr("reduce step\n"));
  EXPECT_LT(drawing.size(), 80u);
}

}  // namespace
}  // namespace capstan::plan
