// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/config.h"

#include <gtest/gtest.h>

namespace capstan::kernels {
namespace {

TEST(KernelConfig, FlatShape_CoversSmallWorkAndCapsBlocks) {
  EXPECT_EQ(flat_shape(1, 4), (LaunchShape{1, 256, 0}));
  EXPECT_EQ(flat_shape(1025, 4), (LaunchShape{2, 256, 0}));
  EXPECT_EQ(flat_shape(int64_t{1} << 40, 4).blocks, 4096);
}

TEST(KernelConfig, RowShape_HoldsEveryRow) {
  for (int64_t width = 1; width <= 32768; width = width < 64 ? width + 1 : width * 5 / 4) {
    const RowShape s = row_shape(width, 8, true);
    if (s.chunks == 0) {
      EXPECT_GT(width, s.vector == 1 ? 8192 : 16384);
      continue;
    }
    EXPECT_GE(int64_t{s.threads_per_row} * s.chunks * s.vector, width);
    EXPECT_EQ(s.threads_per_row % kWarp, 0);
    EXPECT_LE(s.threads(), kMostRowThreads);
  }
}

TEST(KernelConfig, RowShape_TakesVectorsOnlyWhereTheyFit) {
  EXPECT_EQ(row_shape(768, 8, true), (RowShape{8, 1, 96, 2}));
  EXPECT_EQ(row_shape(4096, 8, true), (RowShape{8, 1, 512, 1}));
  EXPECT_EQ(row_shape(8192, 8, true), (RowShape{8, 4, 256, 1}));
  EXPECT_EQ(row_shape(768, 8, false).vector, 1);
  EXPECT_EQ(row_shape(771, 8, true).vector, 1);
}

TEST(KernelConfig, RowGroups_CoverRowsAndDependOnRowsAlone) {
  EXPECT_EQ(row_groups(0), (RowGroups{0, 0}));
  EXPECT_EQ(row_groups(1), (RowGroups{1, 4}));
  for (const int64_t rows : {3, 2048, 2049, 32768, 1000003}) {
    const RowGroups g = row_groups(rows);
    EXPECT_LE(g.groups, 512);
    EXPECT_GE(g.groups * g.rows_per_group, rows);
    EXPECT_LT((g.groups - 1) * g.rows_per_group, rows);
  }
}

}  // namespace
}  // namespace capstan::kernels
