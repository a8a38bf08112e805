// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// check_schedule must notice every fault: schedules are damaged on purpose.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "capstan/base/text.h"
#include "capstan/plan/schedule.h"
#include "schedule_oracle.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;

std::string check(const Schedule& schedule) { return join(check_schedule(schedule), "\n"); }

Schedule gpipe(int stages, int micro_batches) {
  return build_schedule("gpipe", Pass::kTrain, stages, micro_batches, 1);
}

std::vector<Schedule> samples() {
  std::vector<Schedule> list;
  for (const Pass pass : {Pass::kTrain, Pass::kForwardOnly}) {
    for (const char* kind : {"gpipe", "1f1b", "zero_bubble"})
      for (const auto& [ranks, micro_batches] : {std::pair{1, 2}, {3, 4}, {4, 3}})
        list.push_back(build_schedule(kind, pass, ranks, micro_batches, 1));
    list.push_back(build_schedule("interleaved", pass, 6, 6, 2));
    list.push_back(build_schedule("interleaved", pass, 3, 2, 3));
    list.push_back(build_schedule("zero_bubble", pass, 6, 7, 2));
    list.push_back(build_schedule("zero_bubble", pass, 2, 2, 2));
  }
  return list;
}

std::string place(const Schedule& schedule, size_t rank, size_t i) {
  const Instruction& at = schedule.ranks[rank][i];
  return fmt::format("{}, {} stages, rank {}, instruction {}: {} {}.{}", schedule.name,
                     schedule.stages, rank, i, name_of(at.op), at.micro_batch, at.chunk);
}

template <class Visit>
void for_each_instruction(Visit visit) {
  for (const Schedule& good : samples())
    for (size_t rank = 0; rank < good.ranks.size(); ++rank)
      for (size_t i = 0; i < good.ranks[rank].size(); ++i) visit(good, rank, i);
}

TEST(CheckSchedule, NoticesEveryMissingInstruction) {
  for_each_instruction([](const Schedule& good, size_t rank, size_t i) {
    Schedule bad = good;
    bad.ranks[rank].erase(bad.ranks[rank].begin() + static_cast<long>(i));
    EXPECT_NE(check(bad), "") << "without " << place(good, rank, i);
  });
}

TEST(CheckSchedule, NoticesEveryRepeatedInstruction) {
  for_each_instruction([](const Schedule& good, size_t rank, size_t i) {
    Schedule bad = good;
    Instruction again = good.ranks[rank][i];
    again.group = 1 << 20;
    bad.ranks[rank].insert(bad.ranks[rank].begin() + static_cast<long>(i) + 1, again);
    EXPECT_NE(check(bad), "") << "twice " << place(good, rank, i);
  });
}

TEST(CheckSchedule, NoticesEveryChangedField) {
  for_each_instruction([](const Schedule& good, size_t rank, size_t i) {
    const auto expect_noticed = [&](const char* what, auto change) {
      Schedule bad = good;
      change(bad.ranks[rank][i]);
      EXPECT_NE(check(bad), "") << what << " of " << place(good, rank, i);
    };
    const Op op = good.ranks[rank][i].op;
    const bool numbered = op != Op::kReduce && op != Op::kStep;
    if (numbered && good.micro_batches > 1)
      expect_noticed("micro-batch", [&](Instruction& x) {
        x.micro_batch = (x.micro_batch + 1) % good.micro_batches;
      });
    if (op != Op::kStep && good.stage_of[rank].size() > 1)
      expect_noticed("chunk", [&](Instruction& x) { x.chunk = x.chunk == 0 ? 1 : 0; });
    if (is_send(op) || is_receive(op))
      expect_noticed("peer", [&](Instruction& x) { x.peer = static_cast<int>(rank); });
    if (op == Op::kBackward)
      expect_noticed("half", [](Instruction& x) { x.op = Op::kBackwardInput; });
  });
}

// The first makes what the second needs, or both use one channel.
bool is_bound(const Schedule& schedule, size_t rank, const Instruction& a, const Instruction& b) {
  if (b.op == Op::kStep) return true;
  const bool same = a.chunk == b.chunk && a.micro_batch == b.micro_batch;
  const bool transfers = a.peer >= 0 && b.peer >= 0;
  if (transfers) return a.op == b.op && a.peer == b.peer;
  if (b.op == Op::kReduce)
    return a.chunk == b.chunk && (a.op == Op::kBackward || a.op == Op::kBackwardWeight);
  // A gradient may leave before or after the weight half, and an activation at any time.
  if (same) {
    const bool apart = (a.op == Op::kBackwardWeight) != (b.op == Op::kBackwardWeight);
    return !(apart && transfers) && !(a.op == Op::kSendGradient || b.op == Op::kReceiveGradient) &&
           a.op != Op::kSendActivation;
  }
  const auto& stages = schedule.stage_of[rank];
  const bool neighbours =
      a.micro_batch == b.micro_batch && a.peer < 0 && b.peer < 0 &&
      std::abs(stages[static_cast<size_t>(a.chunk)] - stages[static_cast<size_t>(b.chunk)]) == 1;
  return neighbours && a.op == b.op && a.op != Op::kBackwardWeight;
}

// Neighbours that depend on each other may not change places; where others may, the lists must
// still compute the right values. The groups stay where they are.
TEST(CheckSchedule, NoticesEverySwapThatMatters) {
  int noticed = 0, harmless = 0;
  for_each_instruction([&](const Schedule& good, size_t rank, size_t i) {
    if (i + 1 == good.ranks[rank].size()) return;
    Schedule bad = good;
    Instruction &a = bad.ranks[rank][i], &b = bad.ranks[rank][i + 1];
    const bool bound = is_bound(good, rank, a, b);
    std::swap(a, b);
    std::swap(a.group, b.group);
    const bool is_noticed = !check(bad).empty();
    EXPECT_TRUE(is_noticed || !bound) << "swapped with the next: " << place(good, rank, i);
    if (!is_noticed) {
      EXPECT_EQ(testing::execute(bad), "") << place(good, rank, i);
    }
    ++(is_noticed ? noticed : harmless);
  });
  EXPECT_GT(noticed, 500);
  EXPECT_LT(harmless, noticed);
}

// Any two instructions of a rank: what is called legal computes the right values.
TEST(CheckSchedule, NothingThatItCallsLegalGoesWrong) {
  std::mt19937 random(7);
  int noticed = 0;
  const std::vector<Schedule> goods = samples();
  for (int round = 0; round < 3000; ++round) {
    Schedule bad = goods[random() % goods.size()];
    auto& list = bad.ranks[random() % bad.ranks.size()];
    Instruction &a = list[random() % list.size()], &b = list[random() % list.size()];
    std::swap(a, b);
    std::swap(a.group, b.group);
    if (check(bad).empty()) {
      EXPECT_EQ(testing::execute(bad), "") << draw_schedule(bad, 1000);
    } else {
      ++noticed;
    }
  }
  EXPECT_GT(noticed, 2000);
}

TEST(CheckSchedule, NoticesAWrongOrder) {
  Schedule schedule = gpipe(2, 2);
  auto& list = schedule.ranks[1];  // R F R F B S B S reduce step
  std::swap(list[0], list[2]);
  EXPECT_THAT(check(schedule), HasSubstr("order of receives differs"));
  schedule = gpipe(1, 2);
  std::swap(schedule.ranks[0][0], schedule.ranks[0][1]);
  EXPECT_THAT(check(schedule), HasSubstr("its forward was not run"));
  schedule = gpipe(2, 1);
  std::swap(schedule.ranks[1][0], schedule.ranks[1][1]);
  EXPECT_THAT(check(schedule), HasSubstr("its input was not received"));
  schedule = build_schedule("zero_bubble", Pass::kTrain, 2, 1, 2);  // F.0 F.1 I.1 W.1 reduce ...
  std::swap(schedule.ranks[0][0], schedule.ranks[0][1]);
  EXPECT_THAT(check(schedule), HasSubstr("stage 0 on the same rank was not run before it"));
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
  EXPECT_THAT(check(schedule), HasSubstr("deadlock"));
  // Issued together on rank 0 (equal group), the same order is legal.
  const auto send = std::find_if(first.begin(), first.end(), [](const Instruction& i) {
    return i.op == Op::kSendActivation && i.micro_batch == 1;
  });
  const auto receive = std::find_if(first.begin(), first.end(), [](const Instruction& i) {
    return i.op == Op::kReceiveGradient && i.micro_batch == 0;
  });
  receive->group = send->group;
  EXPECT_EQ(check(schedule), "");
}

// The groups of the lists are needed: with every transfer alone, ranks block each other.
TEST(CheckSchedule, GroupsAreWhatKeepsRanksFromBlocking) {
  for (Schedule schedule : {build_schedule("1f1b", Pass::kTrain, 4, 8, 1),
                            build_schedule("interleaved", Pass::kTrain, 8, 8, 2),
                            build_schedule("zero_bubble", Pass::kTrain, 4, 8, 1),
                            build_schedule("zero_bubble", Pass::kTrain, 8, 8, 2)}) {
    EXPECT_EQ(check(schedule), "");
    for (auto& list : schedule.ranks)
      for (size_t i = 0; i < list.size(); ++i) list[i].group = static_cast<int>(i);
    EXPECT_THAT(check(schedule), HasSubstr("deadlock")) << schedule.name;
    EXPECT_EQ(testing::execute(schedule), "");  // buffers would hide it
  }
}

TEST(CheckSchedule, NoticesWrongPeersPlacesAndGroups) {
  Schedule schedule = gpipe(3, 1);
  schedule.ranks[0][1].peer = 2;
  EXPECT_THAT(check(schedule), HasSubstr("peer is 2"));
  schedule = gpipe(2, 1);
  schedule.ranks[0][0].chunk = 1;
  EXPECT_THAT(check(schedule), HasSubstr("outside the schedule"));
  schedule = gpipe(2, 1);
  schedule.rank_of = {0, 0};
  EXPECT_THAT(check(schedule), HasSubstr("stage 1 is not placed here"));
  schedule = gpipe(2, 1);
  schedule.stage_of = {{0}, {}};
  schedule.ranks[1].clear();
  EXPECT_THAT(check(schedule), HasSubstr("stage 1 has no rank"));
  schedule.micro_batches = 0;
  EXPECT_THAT(check(schedule), HasSubstr("does not fit"));
  schedule = gpipe(2, 1);
  schedule.ranks[0][1].group = schedule.ranks[0][0].group;
  EXPECT_THAT(check(schedule), HasSubstr("in a group with its neighbour"));
  schedule = build_schedule("zero_bubble", Pass::kTrain, 4, 1, 2);
  auto& turn = schedule.ranks[1];
  turn.insert(turn.begin() + 2, {Op::kSendActivation, 0, 0, 1, 1 << 20});
  EXPECT_THAT(check(schedule), HasSubstr("the other end is on the same rank"));
}

TEST(CheckSchedule, NoticesAnEarlyReductionOrStep) {
  Schedule schedule = gpipe(2, 2);
  auto& list = schedule.ranks[0];
  const auto reduce = std::find_if(list.begin(), list.end(),
                                   [](const Instruction& i) { return i.op == Op::kReduce; });
  std::swap(*reduce, *(reduce - 1));
  EXPECT_THAT(check(schedule), HasSubstr("not final"));
  schedule = gpipe(1, 1);
  std::swap(schedule.ranks[0][2], schedule.ranks[0][3]);
  EXPECT_THAT(check(schedule), HasSubstr("was not reduced"));
  EXPECT_THAT(check(schedule), HasSubstr("comes after the optimizer step"));
}

TEST(CheckSchedule, NoticesABackwardInAForwardPass) {
  Schedule schedule = gpipe(1, 1);
  schedule.pass = Pass::kForwardOnly;
  EXPECT_THAT(check(schedule), HasSubstr("the pass has no backward"));
}

TEST(CheckSchedule, NoticesAWholeAndASplitBackward) {
  Schedule schedule = gpipe(1, 1);  // F0 B0 reduce step
  auto& list = schedule.ranks[0];
  list.insert(list.begin() + 2, {Op::kBackwardInput, 0, 0, -1, 100});
  EXPECT_THAT(check(schedule), HasSubstr("its gradient was made before"));
  list[2] = {Op::kBackwardWeight, 0, 0, -1, 100};
  EXPECT_THAT(check(schedule), HasSubstr("its input half was not run"));
}

}  // namespace
}  // namespace capstan::plan
