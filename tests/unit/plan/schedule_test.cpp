// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/schedule.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "schedule_oracle.h"

namespace capstan::plan {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Kind {
  const char* name;
  int chunks;
};
constexpr Kind kKinds[] = {{"gpipe", 1},       {"1f1b", 1},        {"interleaved", 2},
                           {"interleaved", 3}, {"interleaved", 4}, {"zero_bubble", 1},
                           {"zero_bubble", 2}};
constexpr Pass kPasses[] = {Pass::kTrain, Pass::kForwardOnly, Pass::kDecode};

Schedule build(const Kind& kind, int ranks, int micro_batches, Pass pass = Pass::kTrain) {
  return build_schedule(kind.name, pass, ranks * kind.chunks, micro_batches, kind.chunks);
}
// Forward passes take any number of micro-batches.
bool is_legal(const Kind& kind, int ranks, int micro_batches, Pass pass) {
  return pass != Pass::kTrain || !schedule_problem(kind.name, ranks, micro_batches, kind.chunks);
}

std::vector<Op> ops_of(const Schedule& schedule, size_t rank) {
  std::vector<Op> ops;
  for (const Instruction& i : schedule.ranks[rank]) ops.push_back(i.op);
  return ops;
}
std::string line_of(const Schedule& schedule, size_t rank) {
  const std::string text = draw_schedule(schedule, 10000);
  size_t begin = 0;
  for (size_t k = 0; k < rank; ++k) begin = text.find('\n', begin) + 1;
  return text.substr(begin, text.find('\n', begin) - begin);
}

// Closed forms of what a rank holds, in (micro-batch, chunk) pairs.
int expected_peak(const Kind& kind, int p, int m, int rank) {
  const std::string name = kind.name;
  if (p == 1) return kind.chunks;
  if (name == "gpipe") return m;
  if (name == "1f1b") return std::min(m, p - rank);
  if (name == "interleaved")
    return std::min(m * kind.chunks, 2 * (p - 1 - rank) + (kind.chunks - 1) * p + 1);
  return std::min(m, p) * kind.chunks;
}

TEST(Schedule, EveryKindAndSizeIsLegalAndHoldsWhatItsFormulaSays) {
  for (const Kind& kind : kKinds)
    for (int p = 1; p <= 16; ++p)
      for (int m = 1; m <= 64; ++m)
        for (const Pass pass : kPasses) {
          if (!is_legal(kind, p, m, pass)) continue;
          const Schedule schedule = build(kind, p, m, pass);
          const auto text = [&] {
            return fmt::format("{} chunks {}, {} ranks, {} micro-batches, pass {}", kind.name,
                               kind.chunks, p, m, static_cast<int>(pass));
          };
          ASSERT_EQ(join(check_schedule(schedule), "\n"), "") << text();
          for (int rank = 0; rank < p; ++rank) {
            const int peak = peak_in_flight(schedule, rank);
            const int formula = pass == Pass::kTrain ? expected_peak(kind, p, m, rank) : 1;
            // A short ZB-V step holds less than its bound.
            const bool is_bound = kind.chunks == 2 && std::string(kind.name) == "zero_bubble" &&
                                  m < 2 * p && pass == Pass::kTrain;
            ASSERT_TRUE(is_bound ? peak <= formula : peak == formula)
                << text() << ": rank " << rank << " holds " << peak << ", not " << formula;
          }
        }
}

// What check_schedule calls legal, computes the right values: proven by executing the lists.
TEST(Schedule, EveryKindComputesWhatOneRankComputes) {
  for (const Kind& kind : kKinds)
    for (const int p : {1, 2, 3, 4, 5, 8})
      for (const int m : {1, 2, 3, 4, 5, 8, 10, 16})
        for (const Pass pass : kPasses) {
          if (!is_legal(kind, p, m, pass)) continue;
          ASSERT_EQ(testing::execute(build(kind, p, m, pass)), "")
              << kind.name << " chunks " << kind.chunks << ", " << p << " ranks, " << m;
        }
}

TEST(Schedule, PlacesStagesRoundRobinOrInAVee) {
  EXPECT_THAT(build({"interleaved", 2}, 3, 3).stage_of,
              ElementsAre(ElementsAre(0, 3), ElementsAre(1, 4), ElementsAre(2, 5)));
  const Schedule vee = build({"zero_bubble", 2}, 3, 3);
  EXPECT_THAT(vee.stage_of, ElementsAre(ElementsAre(0, 5), ElementsAre(1, 4), ElementsAre(2, 3)));
  EXPECT_THAT(vee.rank_of, ElementsAre(0, 1, 2, 2, 1, 0));
}

TEST(Schedule, OneStageRunsMicroBatchesOneByOne) {
  for (const char* kind : {"gpipe", "1f1b"}) {
    const Schedule schedule = build({kind, 1}, 1, 3);
    EXPECT_EQ(line_of(schedule, 0), "rank 0 | F0 B0 F1 B1 F2 B2 reduce step");
    EXPECT_EQ(peak_in_flight(schedule, 0), 1);
  }
  EXPECT_EQ(line_of(build({"zero_bubble", 1}, 1, 2), 0), "rank 0 | F0 I0 W0 F1 I1 W1 reduce step");
  EXPECT_EQ(line_of(build({"interleaved", 3}, 1, 1), 0),
            "rank 0 | F0.0 F0.1 F0.2 B0.2 reduce.2 B0.1 reduce.1 B0.0 reduce.0 step");
  EXPECT_EQ(line_of(build({"zero_bubble", 2}, 1, 1), 0),
            "rank 0 | F0.0 F0.1 I0.1 W0.1 reduce.1 I0.0 W0.0 reduce.0 step");
  EXPECT_EQ(line_of(build({"interleaved", 2}, 1, 2, Pass::kDecode), 0),
            "rank 0 | F0.0 F0.1 F1.0 F1.1");
}

TEST(Schedule, StagesExchangeActivationsAndGradients) {
  const Schedule schedule = build({"gpipe", 1}, 3, 2);
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

TEST(Schedule, OneForwardOneBackwardPairsSendsWithReceives) {
  const Schedule schedule = build({"1f1b", 1}, 2, 3);
  EXPECT_EQ(line_of(schedule, 0), "rank 0 | F0 >1 F1 >1 1< B0 F2 >1 1< B1 1< B2 reduce step");
  EXPECT_EQ(line_of(schedule, 1), "rank 1 | 0> F0 B0 <0 0> F1 B1 <0 0> F2 B2 <0 reduce step");
  // F1 of rank 0 and B0 of rank 1 cross: each side issues its send and its receive together.
  EXPECT_EQ(schedule.ranks[0][3].group, schedule.ranks[0][4].group);
  EXPECT_EQ(schedule.ranks[1][3].group, schedule.ranks[1][4].group);
  EXPECT_NE(schedule.ranks[0][1].group, schedule.ranks[0][2].group);
}

TEST(Schedule, ZeroBubbleDelaysWeightHalves) {
  const Schedule schedule = build({"zero_bubble", 1}, 2, 3);
  EXPECT_EQ(line_of(schedule, 0),
            "rank 0 | F0 >1 F1 >1 1< I0 W0 F2 >1 1< I1 W1 1< I2 W2 reduce step");
  EXPECT_EQ(line_of(schedule, 1),
            "rank 1 | 0> F0 I0 <0 0> F1 I1 <0 W0 0> F2 I2 <0 W1 W2 reduce step");
}

TEST(Schedule, TheTurnOfAVeeNeedsNoTransfer) {
  const Schedule schedule = build({"zero_bubble", 2}, 4, 8);
  for (const Instruction& i : schedule.ranks[3]) {
    if (is_send(i.op)) {
      EXPECT_EQ(i.chunk, i.op == Op::kSendActivation ? 1 : 0);
    }
    if (is_receive(i.op)) {
      EXPECT_EQ(i.chunk, i.op == Op::kReceiveActivation ? 0 : 1);
    }
    EXPECT_NE(i.peer, 3);
  }
}

// Receives stand right before their use; where one had to be moved up, nothing else can be done
// without it. Kinds with one stage per rank need no such receive.
TEST(Schedule, ReceivesStandBeforeTheirUse) {
  for (const Kind& kind : {Kind{"gpipe", 1}, Kind{"1f1b", 1}, Kind{"zero_bubble", 1}}) {
    const Schedule schedule = build(kind, 8, 24);
    for (const auto& list : schedule.ranks)
      for (size_t i = 0; i < list.size(); ++i) {
        if (!is_receive(list[i].op)) continue;
        const auto use = std::find_if(list.begin() + static_cast<long>(i), list.end(),
                                      [](const Instruction& next) { return next.peer < 0; });
        EXPECT_EQ(use->micro_batch, list[i].micro_batch) << kind.name;
      }
  }
}

TEST(Schedule, ForwardPassesHaveNoBackward) {
  for (const Kind& kind : kKinds)
    for (const Pass pass : {Pass::kForwardOnly, Pass::kDecode})
      for (const Op op : ops_of(build(kind, 4, pass == Pass::kDecode ? 1 : 6, pass), 1))
        EXPECT_TRUE(op == Op::kForward || op == Op::kSendActivation ||
                    op == Op::kReceiveActivation);
  EXPECT_EQ(line_of(build({"zero_bubble", 2}, 2, 1, Pass::kDecode), 0), "rank 0 | F0.0 >1 1> F0.1");
  EXPECT_EQ(line_of(build({"zero_bubble", 2}, 2, 1, Pass::kDecode), 1), "rank 1 | 0> F0.0 F0.1 >0");
}

TEST(Schedule, ProblemNamesTheNearestLegalValues) {
  EXPECT_EQ(schedule_problem("interleaved", 4, 8, 2), std::nullopt);
  EXPECT_EQ(schedule_problem("interleaved", 1, 7, 2), std::nullopt);
  EXPECT_EQ(schedule_problem("zero_bubble", 4, 1, 2), std::nullopt);
  EXPECT_THAT(schedule_problem("interleaved", 4, 6, 2).value(),
              HasSubstr("got 6, need a multiple of the 4 pipeline ranks, nearest 4 or 8 (schedule "
                        "interleaved runs rounds"));
  EXPECT_THAT(schedule_problem("interleaved", 4, 3, 2).value(), HasSubstr("nearest 4 ("));
  EXPECT_THAT(schedule_problem("interleaved", 4, 8, 1).value(),
              HasSubstr("parallel.pipeline.chunks: got 1, need 2 or more"));
  EXPECT_THAT(schedule_problem("zero_bubble", 4, 8, 3).value(), HasSubstr("got 3, need 1 or 2"));
  for (const char* kind : {"gpipe", "1f1b"})
    EXPECT_THAT(schedule_problem(kind, 4, 8, 2).value(), HasSubstr("got 2, need 1 ("));
  EXPECT_THAT(schedule_problem("gpip", 4, 8, 1).value(),
              HasSubstr("got 'gpip', need one of 1f1b, gpipe, interleaved, zero_bubble"));
}

TEST(Schedule, WhatCannotBeBuiltIsRefused) {
  EXPECT_THAT(schedule_names(), ElementsAre("1f1b", "gpipe", "interleaved", "zero_bubble"));
  for (const auto& [kind, stages, micro_batches, chunks] : {std::tuple{"gpip", 2, 2, 1},
                                                            {"gpipe", 4, 2, 2},
                                                            {"1f1b", 4, 2, 0},
                                                            {"1f1b", 4, 2, -1},
                                                            {"interleaved", 4, 4, 1},
                                                            {"interleaved", 8, 6, 2},
                                                            {"zero_bubble", 12, 4, 3}})
    EXPECT_THROW((void)build_schedule(kind, Pass::kTrain, stages, micro_batches, chunks),
                 ConfigError)
        << kind << chunks;
  EXPECT_THROW((void)build_schedule("gpipe", Pass::kTrain, 0, 2, 1), InternalError);
  EXPECT_THROW((void)build_schedule("gpipe", Pass::kTrain, 2, 0, 1), InternalError);
  EXPECT_THROW((void)build_schedule("interleaved", Pass::kForwardOnly, 5, 4, 2), InternalError);
  EXPECT_NO_THROW((void)build_schedule("interleaved", Pass::kForwardOnly, 8, 6, 2));
  try {
    (void)build_schedule("interleaved", Pass::kTrain, 8, 6, 2);
  } catch (const ConfigError& e) {
    EXPECT_THAT(e.what(),
                HasSubstr("micro-batches per step failed: got 6, need a multiple of the 4 "
                          "pipeline ranks, nearest 4 or 8"));
    EXPECT_THAT(e.what(), HasSubstr("batch.micro_samples"));
  }
}

TEST(Schedule, ListsNameEachStep) {
  EXPECT_EQ(draw_schedule(build({"gpipe", 1}, 2, 1)),
            "rank 0 | F0 >1 1< B0 reduce step\nrank 1 | 0> F0 B0 <0 reduce step\n");
  const std::string drawing = draw_schedule(build({"gpipe", 1}, 1, 100), 60);
  EXPECT_THAT(drawing, HasSubstr(" ... "));
  EXPECT_THAT(drawing, HasSubstr("reduce step\n"));
  EXPECT_LT(drawing.size(), 80u);
}

}  // namespace
}  // namespace capstan::plan
