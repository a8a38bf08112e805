// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/wait_graph_internal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace capstan::comm {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string text_of(int rank, const std::map<int, RankStatus>& statuses) {
  return format_error(explain_deadline(rank, 30, statuses));
}

TEST(WaitGraph, FollowsTheChainToTheRankThatWaitsForNobody) {
  const std::string text = text_of(0, {{0, {.waits_in = "A", .waits_for = {1}}},
                                       {1, {.waits_in = "B", .waits_for = {2, 0}}},
                                       {2, {.waits_in = "C", .waits_for = {3}}},
                                       {3, {.last = "all_gather #7 on tp[2,3]: done"}}});
  EXPECT_THAT(
      text,
      AllOf(
          HasSubstr("waiting in A failed: got no arrival of rank 3 within 30 s"),
          HasSubstr("rank 3 waits for nobody; its last operation: all_gather #7 on tp[2,3]: done"),
          HasSubstr("rank 1 waits in B for ranks 2, 0"), HasSubstr("Look at rank 3 first")));
}

TEST(WaitGraph, SilentRank_IsCalledSilent) {
  const std::string text = text_of(0, {{0, {.waits_in = "A", .waits_for = {1, 2}}},
                                       {1, {.last = "none"}},
                                       {2, {.answered = false}}});
  EXPECT_THAT(text, AllOf(HasSubstr("no arrival of ranks 1, 2"),
                          HasSubstr("rank 2 gives no sign of life")));
}

TEST(WaitGraph, Cycle_IsSaidToBeOne) {
  const std::string text = text_of(
      0, {{0, {.waits_in = "A", .waits_for = {1}}}, {1, {.waits_in = "B", .waits_for = {0}}}});
  EXPECT_THAT(text, AllOf(HasSubstr("wait for each other"),
                          HasSubstr("rank 1 waits in B for rank 0"), Not(HasSubstr("no arrival"))));
}

TEST(WaitGraph, AllCameButNoEnd_PointsAtTheNetwork) {
  EXPECT_THAT(text_of(0, {{0, {.waits_in = "A"}}, {1, {.waits_in = "A"}}}),
              HasSubstr("all ranks but no end"));
}

TEST(WaitGraph, ManyMissingRanks_AreShortened) {
  std::map<int, RankStatus> statuses;
  for (int r = 1; r < 1000; ++r) {
    statuses[0].waits_for.push_back(r);
    statuses[r].last = "none";
  }
  statuses[0].waits_in = "A";
  const std::string text = text_of(0, statuses);
  EXPECT_THAT(text, AllOf(HasSubstr("(999 ranks)"), HasSubstr("and 992 more")));
  EXPECT_LT(text.size(), 1500U);
}

}  // namespace
}  // namespace capstan::comm
