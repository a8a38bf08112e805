// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "launch/slurm_internal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"

namespace capstan::launch::internal {
namespace {

TEST(Slurm, TasksOfNode_ReadsRepeats) {
  const int expected[] = {2, 2, 2, 1, 16, 16};
  for (int node = 0; node < 6; ++node)
    EXPECT_EQ(tasks_of_node("2(x3),1,16(x2)", node, 100), expected[node]) << node;
  EXPECT_EQ(tasks_of_node("4", 0, 4), 4);
}

TEST(Slurm, TasksOfNode_RefusesWhatItIsNot) {
  for (const char* bad : {"", "x", "0", "-2", "5", "2(x", "2(x0)", "2(x3", "2x3", "2,", "2(x3),a"})
    EXPECT_THROW((void)tasks_of_node(bad, 5, 4), EnvError) << bad;
  EXPECT_THROW((void)tasks_of_node("2(x3),1", 4, 4), EnvError) << "no fifth node";
}

TEST(Slurm, FirstHost_ExpandsOnlyTheFirst) {
  const std::pair<const char*, const char*> cases[] = {{"n1", "n1"},
                                                       {"n1,n2", "n1"},
                                                       {"n[08-10,12],m", "n08"},
                                                       {"a[01-03,7]-b[2-4],c", "a01-b2"},
                                                       {"rack[7].example.org", "rack7.example.org"},
                                                       {"n[1-999999999999999999]", "n1"}};
  for (const auto& [list, host] : cases) EXPECT_EQ(first_host(list), host) << list;
}

TEST(Slurm, FirstHost_RefusesWhatItIsNot) {
  for (const char* bad : {"", ",", "a[", "a[]", "a[-1]", "a[b]", "a b", "a;rm", "a$(x)", "[[1]]"})
    EXPECT_THROW((void)first_host(bad), EnvError) << bad;
  EXPECT_THROW((void)first_host(std::string(1000, 'a')), EnvError);
}

}  // namespace
}  // namespace capstan::launch::internal
