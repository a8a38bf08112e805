// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/env.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "base/machine_internal.h"
#include "capstan/base/error.h"

namespace capstan {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

TEST(Env, Numbers_AreRangeCheckedWithTheName) {
  const char* name = "CAPSTAN_TEST_NUMBER";
  ::unsetenv(name);
  EXPECT_EQ(read_env_int(name, 0, 9), std::nullopt);
  ::setenv(name, "7", 1);
  EXPECT_EQ(read_env_int(name, 0, 9), 7);
  for (const char* bad : {"", "10", "-1", "7x", " 7", "0x7", "99999999999999999999", "1e0"}) {
    ::setenv(name, bad, 1);
    try {
      (void)read_env_int(name, 0, 9);
      FAIL() << bad;
    } catch (const EnvError& error) {
      EXPECT_THAT(error.what(), HasSubstr("CAPSTAN_TEST_NUMBER"));
      EXPECT_THAT(error.what(), HasSubstr("an integer from 0 to 9"));
    }
  }
  EXPECT_EQ(read_env(name), "1e0");
  ::setenv(name, "", 1);
  EXPECT_EQ(read_env(name), "");
  ::unsetenv(name);
  EXPECT_EQ(read_env(name), std::nullopt);
}

TEST(Env, Clocks) {
  EXPECT_THAT(utc_now(),
              testing::MatchesRegex("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}"
                                    "\\.[0-9]{3}Z"));
  const int64_t before = monotonic_ns();
  EXPECT_GE(monotonic_ns(), before);
  EXPECT_GT(resident_bytes(), 1 << 20);
  EXPECT_FALSE(host_name().empty());
  EXPECT_FALSE(cpu_model().empty());
  EXPECT_FALSE(cpu_has("no_such_flag"));
#ifdef __x86_64__
  EXPECT_TRUE(cpu_has("sse2"));
#endif
}

TEST(Env, Cpus_FollowTheAffinityOfTheThread) {
  const std::vector<int> all = internal::affinity_cpus();
  ASSERT_FALSE(all.empty());
  std::thread([&] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<size_t>(all.back()), &one);
    ASSERT_EQ(::sched_setaffinity(0, sizeof(one), &one), 0);
    EXPECT_EQ(internal::affinity_cpus(), std::vector<int>{all.back()});
    EXPECT_EQ(allowed_cpus(), 1);
    EXPECT_EQ(allowed_physical_cores(), 1);
  }).join();
  EXPECT_LE(allowed_physical_cores(), allowed_cpus());
}

class FakeSystem : public testing::Test {
 protected:
  FakeSystem() {
    std::string name = (fs::temp_directory_path() / "capstan-system-XXXXXX").native();
    folder_ = ::mkdtemp(name.data());
    roots_ = {folder_ / "sys", folder_ / "proc"};
  }
  ~FakeSystem() override { fs::remove_all(folder_); }
  void put(const Path& path, const std::string& content) const {
    fs::create_directories((folder_ / path).parent_path());
    write_file_atomic(folder_ / path, content);
  }
  Path folder_;
  internal::SystemRoots roots_;
};

TEST_F(FakeSystem, Siblings_CountOnce) {
  const std::string base = "sys/devices/system/cpu/cpu";
  put(base + "0/topology/core_cpus_list", "0,4\n");
  put(base + "1/topology/core_cpus_list", "1,5\n");
  put(base + "4/topology/core_cpus_list", "0,4\n");
  put(base + "5/topology/thread_siblings_list", "1,5\n");
  EXPECT_EQ(internal::count_physical_cores({0, 1, 4, 5}, roots_), 2);
  EXPECT_EQ(internal::count_physical_cores({0, 4}, roots_), 1);
  EXPECT_EQ(internal::count_physical_cores({4, 5}, roots_), 2);
  EXPECT_EQ(internal::count_physical_cores({7, 8}, roots_), 2) << "without topology";
  EXPECT_EQ(internal::count_physical_cores({}, roots_), 1);
}

TEST_F(FakeSystem, CgroupV2_TakesTheLeastLimitUpToTheRoot) {
  put("proc/self/cgroup", "0::/user/job/step\n");
  EXPECT_EQ(internal::cgroup_memory_limit(roots_), std::nullopt);
  put("sys/fs/cgroup/user/job/step/memory.max", "max\n");
  put("sys/fs/cgroup/user/job/memory.max", "1048576\n");
  put("sys/fs/cgroup/user/memory.max", "4194304\n");
  EXPECT_EQ(internal::cgroup_memory_limit(roots_), 1048576);
  put("sys/fs/cgroup/user/job/step/cpu.max", "max 100000\n");
  EXPECT_EQ(internal::cgroup_cpu_quota(roots_), std::nullopt);
  put("sys/fs/cgroup/user/cpu.max", "150000 100000\n");
  EXPECT_EQ(internal::cgroup_cpu_quota(roots_), 1.5);
}

TEST_F(FakeSystem, CgroupV2_InAContainerTheMountPointHolds) {
  put("proc/self/cgroup", "0::/../../docker/abc\n");
  put("sys/fs/cgroup/memory.max", "2097152\n");
  EXPECT_EQ(internal::cgroup_memory_limit(roots_), 2097152);
  put("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(internal::cgroup_memory_limit(roots_), 2097152);
}

TEST_F(FakeSystem, CgroupV1_IsReadToo) {
  put("proc/self/cgroup", "9:name=systemd:/\n4:memory:/job\n2:cpu,cpuacct:/job\n");
  put("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "3145728\n");
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  put("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "-1\n");
  put("sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(internal::cgroup_memory_limit(roots_), 3145728);
  EXPECT_EQ(internal::cgroup_cpu_quota(roots_), std::nullopt);
  put("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "400000\n");
  EXPECT_EQ(internal::cgroup_cpu_quota(roots_), 4.0);
}

TEST_F(FakeSystem, Cpuinfo_WantsTheWholeKey) {
  put("proc/cpuinfo", "model\t\t: 85\nmodel name\t: Test CPU @ 2 GHz\nflags\t\t: sse2 avx2\n");
  EXPECT_EQ(internal::cpuinfo_field("model name", roots_), "Test CPU @ 2 GHz");
  EXPECT_EQ(internal::cpuinfo_field("model", roots_), "85");
  EXPECT_EQ(internal::cpuinfo_field("vendor", roots_), "");
}

TEST(Env, MemoryLimit_IsAtMostTheMachine) {
  EXPECT_GT(memory_limit_bytes(), int64_t{64} << 20);
  EXPECT_LE(memory_limit_bytes(), ::sysconf(_SC_PHYS_PAGES) * ::sysconf(_SC_PAGESIZE) + (1 << 20));
}

}  // namespace
}  // namespace capstan
