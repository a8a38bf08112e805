// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/grid.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "capstan/base/error.h"

namespace capstan::plan {
namespace {

const AxisSet kEveryAxis[] = {Axis::kTp, Axis::kCp, Axis::kDpShard, Axis::kDpReplicate, Axis::kPp};

std::vector<AxisSet> all_axis_sets() {
  std::vector<AxisSet> sets;
  for (unsigned bits = 0; bits < 32; ++bits) {
    AxisSet set;
    for (const AxisSet axis : kEveryAxis)
      if (bits & axis.bits()) set = set | axis;
    sets.push_back(set);
  }
  return sets;
}

TEST(Grid, TpVariesFastest) {
  const Grid grid({.pp = 2, .dp_replicate = 3, .dp_shard = 2, .cp = 2, .tp = 4});
  EXPECT_EQ(grid.size(), 96);
  EXPECT_EQ(grid.coord(0), (Coord{0, 0, 0, 0, 0}));
  EXPECT_EQ(grid.coord(1), (Coord{0, 0, 0, 0, 1}));
  EXPECT_EQ(grid.coord(4), (Coord{0, 0, 0, 1, 0}));
  EXPECT_EQ(grid.coord(8), (Coord{0, 0, 1, 0, 0}));
  EXPECT_EQ(grid.coord(16), (Coord{0, 1, 0, 0, 0}));
  EXPECT_EQ(grid.coord(48), (Coord{1, 0, 0, 0, 0}));
  EXPECT_EQ(grid.coord(95), (Coord{1, 2, 1, 1, 3}));
  for (int rank = 0; rank < grid.size(); ++rank) EXPECT_EQ(grid.rank_of(grid.coord(rank)), rank);
}

TEST(Grid, RanksAlongMatchTheDefinitionForEverySetOfAxes) {
  const Grid grid({.pp = 2, .dp_replicate = 2, .dp_shard = 3, .cp = 2, .tp = 2});
  for (const AxisSet axes : all_axis_sets()) {
    for (int rank = 0; rank < grid.size(); ++rank) {
      const Coord a = grid.coord(rank);
      std::vector<int> expected;
      for (int other = 0; other < grid.size(); ++other) {
        const Coord b = grid.coord(other);
        const bool along = (a.tp == b.tp || axes.has(Axis::kTp)) &&
                           (a.cp == b.cp || axes.has(Axis::kCp)) &&
                           (a.dp_shard == b.dp_shard || axes.has(Axis::kDpShard)) &&
                           (a.dp_replicate == b.dp_replicate || axes.has(Axis::kDpReplicate)) &&
                           (a.pp == b.pp || axes.has(Axis::kPp));
        if (along) expected.push_back(other);
      }
      const std::vector<int> ranks = grid.ranks_along(axes, rank);
      ASSERT_EQ(ranks, expected) << name_of(axes) << " from " << rank;
      ASSERT_EQ(static_cast<int>(ranks.size()), grid.size_of(axes));
      ASSERT_EQ(ranks[static_cast<size_t>(grid.index_along(axes, rank))], rank);
    }
  }
}

TEST(Grid, DataParallelIndexCountsShardsFastest) {
  const Grid grid({.pp = 2, .dp_replicate = 2, .dp_shard = 3, .cp = 2, .tp = 2});
  EXPECT_EQ(grid.data_parallel_size(), 6);
  for (int rank = 0; rank < grid.size(); ++rank) {
    const Coord c = grid.coord(rank);
    EXPECT_EQ(grid.data_parallel_index(rank), c.dp_replicate * 3 + c.dp_shard);
  }
}

TEST(Grid, ExpertViewFoldsTheSameRanks) {
  const Grid grid({.pp = 2, .dp_replicate = 2, .dp_shard = 2, .cp = 1, .tp = 2, .ep = 4});
  EXPECT_EQ(grid.expert_shard_size(), 1);
  for (int rank = 0; rank < grid.size(); ++rank) {
    const std::vector<int> ep = grid.ranks_along(Axis::kEp, rank),
                           edp = grid.ranks_along(kExpertDataAxes, rank);
    EXPECT_EQ(ep.size(), 4u);
    EXPECT_EQ(edp.size(), 2u);
    EXPECT_EQ(ep[static_cast<size_t>(grid.index_along(Axis::kEp, rank))], rank);
    EXPECT_NE(std::find(edp.begin(), edp.end(), rank), edp.end());
    // An expert group stays within one replica and one stage.
    for (const int other : ep) {
      EXPECT_EQ(grid.coord(other).dp_replicate, grid.coord(rank).dp_replicate);
      EXPECT_EQ(grid.coord(other).pp, grid.coord(rank).pp);
    }
    for (const int other : edp) EXPECT_EQ(grid.coord(other).pp, grid.coord(rank).pp);
    // Both together give the stage.
    std::set<int> reached;
    for (const int a : edp)
      for (const int b : grid.ranks_along(Axis::kEp, a)) reached.insert(b);
    EXPECT_EQ(reached.size(), 8u);
  }
}

TEST(Grid, NamesListAxesFromSlowToFast) {
  EXPECT_EQ(name_of(kDenseAxes), "dp_replicate+dp_shard+cp");
  EXPECT_EQ(name_of(kAllAxes), "pp+dp_replicate+dp_shard+cp+tp");
  EXPECT_EQ(name_of(Axis::kTp), "tp");
  EXPECT_EQ(name_of(AxisSet()), "none");
}

TEST(Grid, ImpossibleSizesAreRefused) {
  EXPECT_THROW(Grid({.tp = 0}), InternalError);
  EXPECT_THROW(Grid({.dp_replicate = -1}), InternalError);
  EXPECT_THROW(Grid({.pp = 65536, .dp_replicate = 65536}), InternalError);
  EXPECT_THROW(Grid({.dp_replicate = 4, .ep = 2}), InternalError);  // never across replicas
  EXPECT_THROW(Grid({.dp_shard = 3, .ep = 2}), InternalError);
  const Grid grid({.dp_shard = 2});
  EXPECT_THROW((void)grid.coord(2), InternalError);
  EXPECT_THROW((void)grid.coord(-1), InternalError);
  EXPECT_THROW((void)grid.rank_of({0, 0, 2, 0, 0}), InternalError);
}

}  // namespace
}  // namespace capstan::plan
