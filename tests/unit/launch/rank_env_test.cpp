// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/launch/rank_env.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>
#include <map>

#include "capstan/base/env.h"
#include "capstan/base/error.h"

namespace capstan::launch {
namespace {

using testing::AllOf;
using testing::HasSubstr;
namespace fs = std::filesystem;

class RankEnvTest : public testing::Test {
 protected:
  RankEnvTest() {
    clear();
    std::string name = (fs::temp_directory_path() / "capstan-env-XXXXXX").native();
    folder_ = ::mkdtemp(name.data());
  }
  ~RankEnvTest() override {
    clear();
    fs::remove_all(folder_);
  }
  static void clear() {
    for (const char* name :
         {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) {
      ::unsetenv(name);
      ::unsetenv((std::string("CAPSTAN_") + name).c_str());
    }
    for (const char* name :
         {"CAPSTAN_STORE_FD", "CAPSTAN_GRACE_S", "CAPSTAN_ERROR_FILE", "TORCHELASTIC_RUN_ID",
          "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
          "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID",
          "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID",
          "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"})
      ::unsetenv(name);
  }
  static void set(const std::map<std::string, std::string>& values,
                  const std::string& prefix = "") {
    for (const auto& [name, value] : values) ::setenv((prefix + name).c_str(), value.c_str(), 1);
  }
  static std::string failure() {
    try {
      (void)read_rank_env();
    } catch (const EnvError& error) {
      return error.what();
    }
    return "accepted";
  }
  const std::map<std::string, std::string> good_ = {
      {"RANK", "5"},         {"WORLD_SIZE", "8"},
      {"LOCAL_RANK", "1"},   {"LOCAL_WORLD_SIZE", "4"},
      {"MASTER_ADDR", "n0"}, {"MASTER_PORT", "29500"}};
  const std::map<std::string, std::string> open_mpi_ = {{"OMPI_COMM_WORLD_RANK", "3"},
                                                        {"OMPI_COMM_WORLD_SIZE", "4"},
                                                        {"OMPI_COMM_WORLD_LOCAL_RANK", "3"},
                                                        {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                                                        {"PMIX_NAMESPACE", "1812332545"}};
  const std::map<std::string, std::string> slurm_ = {{"SLURM_JOB_ID", "4711"},
                                                     {"SLURM_STEP_ID", "0"},
                                                     {"SLURM_PROCID", "5"},
                                                     {"SLURM_STEP_NUM_TASKS", "7"},
                                                     {"SLURM_LOCALID", "1"},
                                                     {"SLURM_NODEID", "2"},
                                                     {"SLURM_STEP_TASKS_PER_NODE", "2(x3),1"},
                                                     {"SLURM_STEP_NODELIST", "n[08-10,12]"}};
  Path folder_;
};

TEST_F(RankEnvTest, NothingSet_IsOneRank) {
  const RankEnv env = read_rank_env();
  EXPECT_FALSE(env.launched);
  EXPECT_EQ(env.rank, 0);
  EXPECT_EQ(env.world_size, 1);
  EXPECT_EQ(env.master_port, 0);
}

TEST_F(RankEnvTest, TorchrunNames_AreRead) {
  set(good_);
  const RankEnv env = read_rank_env();
  EXPECT_TRUE(env.launched);
  EXPECT_EQ(env.rank, 5);
  EXPECT_EQ(env.world_size, 8);
  EXPECT_EQ(env.local_rank, 1);
  EXPECT_EQ(env.local_world_size, 4);
  EXPECT_EQ(env.master_addr, "n0");
  EXPECT_EQ(env.master_port, 29500);
  EXPECT_EQ(env.store_fd, std::nullopt);
}

TEST_F(RankEnvTest, OwnNames_WinAsAWhole) {
  set(good_);
  set({{"RANK", "0"},
       {"WORLD_SIZE", "2"},
       {"LOCAL_RANK", "0"},
       {"MASTER_ADDR", "::1"},
       {"MASTER_PORT", "4000"}},
      "CAPSTAN_");
  ::setenv("CAPSTAN_GRACE_S", "30", 1);
  const RankEnv env = read_rank_env();
  EXPECT_EQ(env.rank, 0);
  EXPECT_EQ(env.world_size, 2);
  EXPECT_EQ(env.local_world_size, 2) << "not torchrun's 4";
  EXPECT_EQ(env.master_addr, "::1");
  EXPECT_EQ(env.master_port, 4000);
  EXPECT_EQ(env.grace_s, 30.0);
}

TEST_F(RankEnvTest, BadValues_AreRefusedByName) {
  for (const auto& [name, value] : std::map<std::string, std::string>{{"RANK", "8"},
                                                                      {"WORLD_SIZE", "0"},
                                                                      {"LOCAL_RANK", "4"},
                                                                      {"LOCAL_WORLD_SIZE", "9"},
                                                                      {"MASTER_PORT", "65536"}}) {
    for (const std::string& bad : {value, std::string("-1"), std::string("two"), std::string()}) {
      clear();
      set(good_);
      ::setenv(name.c_str(), bad.c_str(), 1);
      EXPECT_THAT(failure(), AllOf(HasSubstr("variable " + name), HasSubstr("an integer from")))
          << bad;
    }
  }
}

TEST_F(RankEnvTest, MissingValues_AreRefusedByName) {
  for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}) {
    clear();
    set(good_);
    ::unsetenv(name);
    EXPECT_THAT(failure(), HasSubstr("without " + std::string(name)));
  }
  clear();
  set({{"RANK", "0"}, {"WORLD_SIZE", "1"}});
  EXPECT_EQ(failure(), "accepted") << "one rank needs no more";
}

TEST_F(RankEnvTest, OpenMpi_IsReadAndMeetsOnThisMachine) {
  set(open_mpi_);
  const RankEnv env = read_rank_env();
  EXPECT_TRUE(env.launched);
  EXPECT_EQ(env.rank, 3);
  EXPECT_EQ(env.world_size, 4);
  EXPECT_EQ(env.local_rank, 3);
  EXPECT_EQ(env.local_world_size, 4);
  EXPECT_EQ(env.master_addr, "127.0.0.1");
  EXPECT_THAT(env.master_port, AllOf(testing::Ge(20000), testing::Lt(30000)));
  EXPECT_THAT(env.source, HasSubstr("Open MPI"));
  ::setenv("OMPI_COMM_WORLD_RANK", "0", 1);
  ::setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0", 1);
  EXPECT_EQ(read_rank_env().master_port, env.master_port) << "all ranks derive the same";
  ::setenv("PMIX_NAMESPACE", "1812332546", 1);
  EXPECT_NE(read_rank_env().master_port, env.master_port) << "another job, another port";
  set({{"MASTER_ADDR", "n0"}, {"MASTER_PORT", "4000"}});
  EXPECT_EQ(read_rank_env().master_addr, "n0");
  EXPECT_EQ(read_rank_env().master_port, 4000);
}

TEST_F(RankEnvTest, OpenMpiOnSeveralNodes_NeedsTheAddress) {
  set(open_mpi_);
  set({{"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  EXPECT_THAT(failure(), AllOf(HasSubstr("MASTER_ADDR"), HasSubstr("mpirun -x MASTER_ADDR")));
  ::setenv("MASTER_ADDR", "n0", 1);
  EXPECT_EQ(failure(), "accepted");
}

TEST_F(RankEnvTest, SlurmStep_IsReadWithItsFirstHost) {
  set(slurm_);
  const RankEnv env = read_rank_env();
  EXPECT_TRUE(env.launched);
  EXPECT_EQ(env.rank, 5);
  EXPECT_EQ(env.world_size, 7);
  EXPECT_EQ(env.local_rank, 1);
  EXPECT_EQ(env.local_world_size, 2);
  EXPECT_EQ(env.master_addr, "n08");
  EXPECT_THAT(env.master_port, AllOf(testing::Ge(20000), testing::Lt(30000)));
  EXPECT_THAT(env.source, HasSubstr("SLURM_PROCID"));
}

TEST_F(RankEnvTest, SlurmOutsideAStepAndSingleTasks_AreNoRanks) {
  set(slurm_);
  ::unsetenv("SLURM_STEP_ID");  // a batch script
  EXPECT_FALSE(read_rank_env().launched);
  set({{"SLURM_STEP_ID", "0"},
       {"SLURM_PROCID", "0"},
       {"SLURM_STEP_NUM_TASKS", "1"},
       {"OMPI_COMM_WORLD_RANK", "0"},
       {"OMPI_COMM_WORLD_SIZE", "1"}});
  EXPECT_FALSE(read_rank_env().launched) << "an interactive step may start ranks of its own";
}

TEST_F(RankEnvTest, InnerLaunchers_WinOverOuterOnes) {
  set(slurm_);
  set(open_mpi_);
  EXPECT_EQ(read_rank_env().rank, 3) << "mpirun inside a Slurm step";
  set(good_);
  ::setenv("TORCHELASTIC_RUN_ID", "none", 1);
  EXPECT_EQ(read_rank_env().rank, 5) << "torchrun inside them";
  EXPECT_THAT(read_rank_env().source, HasSubstr("torchrun"));
}

TEST_F(RankEnvTest, Contradictions_AreRefusedWithBothNames) {
  set(open_mpi_);
  set({{"RANK", "1"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}});
  EXPECT_THAT(failure(), AllOf(HasSubstr("RANK=1, WORLD_SIZE=4"),
                               HasSubstr("OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_SIZE=4")));
  clear();
  set(slurm_);
  set({{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}});
  EXPECT_THAT(failure(), AllOf(HasSubstr("WORLD_SIZE=8"), HasSubstr("SLURM_STEP_NUM_TASKS=7")));
}

TEST_F(RankEnvTest, AgreeingNames_AreCompleted) {
  set(slurm_);
  set({{"RANK", "5"}, {"WORLD_SIZE", "7"}, {"MASTER_ADDR", "n08"}, {"MASTER_PORT", "4000"}});
  const RankEnv env = read_rank_env();
  EXPECT_EQ(env.local_rank, 1);
  EXPECT_EQ(env.local_world_size, 2);
  EXPECT_EQ(env.master_port, 4000);
}

TEST_F(RankEnvTest, HostileSchedulerValues_AreRefusedByName) {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                           "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"}) {
    for (const char* bad : {"", "-1", "4x", "99999999999999999999", "1e3"}) {
      clear();
      set(open_mpi_);
      ::setenv(name, bad, 1);
      EXPECT_THAT(failure(), HasSubstr("variable " + std::string(name))) << bad;
    }
  }
  for (const auto& name : {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID",
                           "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"}) {
    for (const char* bad : {"", "-1", "2(x3", "2(x99999999999)", "a[01-03", "a;b", "[[[[[["}) {
      clear();
      set(slurm_);
      ::setenv(name, bad, 1);
      if (std::string(name) == "SLURM_STEP_NODELIST" && std::string(bad) == "-1") continue;
      EXPECT_THAT(failure(), HasSubstr("variable " + std::string(name))) << bad;
    }
  }
}

TEST_F(RankEnvTest, StoreDescriptor_MustBeASocket) {
  set({{"RANK", "0"},
       {"WORLD_SIZE", "2"},
       {"LOCAL_RANK", "0"},
       {"MASTER_ADDR", "127.0.0.1"},
       {"MASTER_PORT", "1"}},
      "CAPSTAN_");
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  ASSERT_GT(socket, 2);
  ::setenv("CAPSTAN_STORE_FD", std::to_string(socket).c_str(), 1);
  EXPECT_EQ(read_rank_env().store_fd, socket);
  ::close(socket);
  EXPECT_THAT(failure(), HasSubstr("CAPSTAN_STORE_FD"));
  ::setenv("CAPSTAN_STORE_FD", "1", 1);
  EXPECT_THAT(failure(), HasSubstr("CAPSTAN_STORE_FD"));
}

TEST_F(RankEnvTest, ErrorFile_GoesThere) {
  const Path path = folder_ / "error.json";
  ::setenv("CAPSTAN_ERROR_FILE", path.c_str(), 1);
  ::setenv("CAPSTAN_RANK", "3", 1);
  const int64_t before = monotonic_ns();
  write_error_file(DataError({.module = "data", .what = "reading \"x\"", .got = "\xff"}), 94);
  const auto error = read_error_file(path);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->rank, 3);
  EXPECT_EQ(error->exit_code, 94);
  EXPECT_EQ(error->class_name, "DataError");
  EXPECT_THAT(error->message, HasSubstr("[data] reading \"x\" failed"));
  EXPECT_GE(error->time_ns, before);
  EXPECT_FALSE(error->is_cascade);
  write_error_file(EnvError({.module = "comm", .what = "an all_reduce"}), 91);
  EXPECT_TRUE(read_error_file(path)->is_cascade);
  write_error_file(std::runtime_error("plain"), 91);
  EXPECT_EQ(read_error_file(path)->class_name, "exception");
}

TEST_F(RankEnvTest, ErrorFile_DamageIsNoFile) {
  const Path path = folder_ / "error.json";
  EXPECT_FALSE(read_error_file(path).has_value());
  for (const char* text : {"", "{", "[]", "{\"rank\":-1}", "{\"rank\":\"x\"}"}) {
    std::ofstream(path) << text;
    EXPECT_FALSE(read_error_file(path).has_value()) << text;
  }
}

TEST_F(RankEnvTest, Done_IsDeclaredBesideTheErrorFile) {
  const Path path = folder_ / "error.json";
  EXPECT_FALSE(is_declared_done(path));
  declare_done();  // without a launcher nothing happens
  EXPECT_FALSE(is_declared_done(path));
  ::setenv("CAPSTAN_ERROR_FILE", path.c_str(), 1);
  declare_done();
  EXPECT_TRUE(is_declared_done(path));
  EXPECT_EQ(read_file(folder_ / "done"), "{\"done\":true}\n");
}

}  // namespace
}  // namespace capstan::launch
