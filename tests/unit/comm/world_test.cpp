// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/world.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include "comm/store_internal.h"

namespace capstan::comm {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// Sets the variables for one test and takes them away again.
class RankEnvironment : public ::testing::Test {
 protected:
  void SetUp() override { clear(); }
  void TearDown() override { clear(); }
  static void set(std::initializer_list<std::pair<const char*, const char*>> values) {
    for (const auto& [name, value] : values) ::setenv(name, value, 1);
  }
  static void clear() {
    for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                             "MASTER_PORT", "CAPSTAN_STORE_FD"})
      ::unsetenv(name);
  }
  static void set_second_of_two() {
    set({{"RANK", "1"},
         {"WORLD_SIZE", "2"},
         {"LOCAL_RANK", "1"},
         {"LOCAL_WORLD_SIZE", "2"},
         {"MASTER_ADDR", "localhost"},
         {"MASTER_PORT", "4567"}});
  }
  static std::string refusal() {
    try {
      (void)read_rank_env();
    } catch (const EnvError& e) {
      return e.what();
    }
    return "accepted";
  }
};

TEST_F(RankEnvironment, Nothing_IsOneRank) {
  const RankEnv env = read_rank_env();
  EXPECT_EQ(env.size, 1);
  World world = World::from_env();
  EXPECT_EQ(world.communicator().size(), 1);
  world.close();
}

TEST_F(RankEnvironment, Complete_IsRead) {
  set_second_of_two();
  const RankEnv env = read_rank_env();
  EXPECT_EQ(env.rank, 1);
  EXPECT_EQ(env.size, 2);
  EXPECT_EQ(env.local_rank, 1);
  EXPECT_EQ(env.local_size, 2);
  EXPECT_EQ(env.master_addr, "localhost");
  EXPECT_EQ(env.master_port, 4567);
  EXPECT_FALSE(env.store_descriptor.has_value());
}

TEST_F(RankEnvironment, MissingVariable_IsNamed) {
  for (const char* name :
       {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) {
    set_second_of_two();
    ::unsetenv(name);
    EXPECT_THAT(refusal(), HasSubstr(std::string("no ") + name));
  }
}

TEST_F(RankEnvironment, OutOfRange_IsRefusedWithTheName) {
  set_second_of_two();
  set({{"RANK", "2"}});
  EXPECT_THAT(refusal(), AllOf(HasSubstr("RANK"), HasSubstr("less than WORLD_SIZE = 2")));
  set_second_of_two();
  set({{"MASTER_PORT", "99999"}});
  EXPECT_THAT(refusal(), HasSubstr("MASTER_PORT"));
  set_second_of_two();
  set({{"WORLD_SIZE", "two"}});
  EXPECT_THAT(refusal(), HasSubstr("WORLD_SIZE"));
  set_second_of_two();
  set({{"LOCAL_RANK", "2"}});
  EXPECT_THAT(refusal(), HasSubstr("LOCAL_RANK"));
}

TEST_F(RankEnvironment, StoreDescriptorThatIsNoSocket_IsRefused) {
  set_second_of_two();
  set({{"RANK", "0"}, {"CAPSTAN_STORE_FD", "987"}});
  EXPECT_THAT(refusal(), AllOf(HasSubstr("CAPSTAN_STORE_FD"), HasSubstr("not an open socket")));
}

TEST(Store, MeetingWithoutARank_NamesIt) {
  const auto store = KeyStore::in_process();
  try {
    meet_all_ranks(*store, 0, 3, 0.1);
    FAIL() << "met ranks that do not exist";
  } catch (const EnvError& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("no sign of ranks 1, 2"), HasSubstr("0.1 s")));
  }
}

TEST(Store, SecondProcessOfARankAndOtherWorldSize_AreRefused) {
  const auto store = KeyStore::in_process();
  meet_all_ranks(*store, 0, 1, 1);
  const auto refusal = [&](int rank, int size) -> std::string {
    try {
      meet_all_ranks(*store, rank, size, 0.1);
    } catch (const EnvError& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_THAT(refusal(0, 1), HasSubstr("a second process of that rank"));
  EXPECT_THAT(refusal(0, 2), AllOf(HasSubstr("WORLD_SIZE 2"), HasSubstr("need 1")));
}

}  // namespace
}  // namespace capstan::comm
