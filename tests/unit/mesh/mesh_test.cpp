// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/mesh/mesh.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/comm/world.h"
#include "support/run_ranks.h"

namespace capstan::mesh {
namespace {

using plan::Axis;
using plan::AxisSet;
using plan::Grid;
using ::testing::HasSubstr;

double sum_over(const comm::Communicator& group, double value) {
  const at::Tensor x = at::full({1}, value, at::kDouble);
  group.all_reduce(x).wait();
  return x.item<double>();
}

TEST(Mesh, EveryAxis_JoinsTheRanksThatTheGridNames) {
  const Grid grid({.pp = 2, .dp_replicate = 2, .dp_shard = 1, .cp = 2, .tp = 2});
  test::run_ranks(16, [&](const comm::Communicator& world) {
    Mesh mesh(world, grid);
    EXPECT_EQ(mesh.coord(), grid.coord(world.rank()));
    for (const AxisSet axes :
         {AxisSet(Axis::kTp), AxisSet(Axis::kCp), AxisSet(Axis::kDpShard),
          AxisSet(Axis::kDpReplicate), AxisSet(Axis::kPp), Axis::kDpShard | Axis::kCp,
          Axis::kDpReplicate | Axis::kDpShard | AxisSet(Axis::kCp), Axis::kTp | Axis::kPp}) {
      const comm::Communicator& group = mesh.along(axes);
      const std::vector<int> expected = grid.ranks_along(axes, world.rank());
      EXPECT_EQ(group.ranks(), expected);
      EXPECT_EQ(group.rank(), mesh.index(axes));
      EXPECT_EQ(group.size(), mesh.size(axes));
      EXPECT_EQ(group.axis(), plan::name_of(axes));
      double ranks = 0;
      for (const int rank : expected) ranks += rank;
      EXPECT_EQ(sum_over(group, world.rank()), ranks);
    }
  });
}

TEST(Mesh, AxesOfLengthOne_ShareTheGroup) {
  test::run_ranks(4, [](const comm::Communicator& world) {
    Mesh mesh(world, Grid({.dp_shard = 4}));
    world.ledger().reset();
    EXPECT_EQ(mesh.along(Axis::kDpShard | Axis::kCp).ranks(),
              mesh.along(AxisSet(Axis::kDpShard)).ranks());
    EXPECT_EQ(sum_over(mesh.along(Axis::kDpReplicate | Axis::kDpShard), 1), 4);
    EXPECT_EQ(sum_over(mesh.along(AxisSet(Axis::kTp)), 1), 1);
    // No group was made by these look-ups: no control traffic; counted under the name asked for.
    EXPECT_EQ(world.ledger().table(),
              (comm::Ledger::Table{{"dp_replicate+dp_shard/all_reduce", {1, 8}}}));
  });
}

TEST(Mesh, ConstLookupOfAnUnknownSet_IsRefused) {
  const Mesh mesh(comm::make_fake_communicator(0, 8), Grid({.pp = 2, .dp_shard = 2, .tp = 2}));
  EXPECT_EQ(mesh.along(AxisSet(Axis::kTp)).size(), 2);
  try {
    (void)mesh.along(Axis::kPp | Axis::kTp);
    FAIL() << "found a group that nobody made";
  } catch (const InternalError& e) {
    EXPECT_THAT(e.what(), HasSubstr("axes without a communicator"));
  }
}

TEST(Mesh, WorldOfAnotherSize_IsRefused) {
  try {
    const Mesh mesh(comm::make_fake_communicator(0, 3), Grid({.tp = 2}));
    FAIL() << "accepted";
  } catch (const InternalError& e) {
    EXPECT_THAT(e.what(), testing::AllOf(HasSubstr("3 ranks"), HasSubstr("need 2")));
  }
}

TEST(Mesh, Default_IsOneRank) {
  Mesh mesh;
  EXPECT_EQ(mesh.along(AxisSet(Axis::kDpShard)).size(), 1);
  EXPECT_EQ(mesh.rank(), 0);
}

}  // namespace
}  // namespace capstan::mesh
