// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/threads.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/device/matmul_peak.h"

namespace capstan::device {
namespace {

TEST(Threads, SetTwo_ParallelForUsesTwo) {
  set_threads(2);
  std::atomic<int> ranges = 0;
  at::parallel_for(0, 2, 1, [&](int64_t, int64_t) { ++ranges; });
  EXPECT_EQ(ranges, 2);
  EXPECT_EQ(threads(), 2);
  set_threads(1);
  EXPECT_EQ(threads(), 1);
}

TEST(Threads, BelowOne_IsRefused) { EXPECT_THROW(set_threads(0), ConfigError); }

TEST(Threads, Recommended_SharesThePhysicalCores) {
  EXPECT_EQ(recommended_threads(1), allowed_physical_cores());
  EXPECT_EQ(recommended_threads(1000000), 1);
  EXPECT_EQ(recommended_threads(0), allowed_physical_cores());
}

TEST(Threads, OneOpenMpRuntime_IsLoaded) {
  at::parallel_for(0, 2, 1, [](int64_t, int64_t) {});
  std::set<std::string> libraries;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (const auto at = line.find('/');
        at != std::string::npos && line.find("libgomp") != std::string::npos)
      libraries.insert(line.substr(at));
  EXPECT_EQ(libraries.size(), 1U);
}

TEST(MatmulPeak, MeasuresAPlausibleRateAndRestoresThreads) {
  set_threads(2);
  const double gflops = measure_matmul_peak(DType::kFp32, 1);
  EXPECT_GT(gflops, 0.05);
  EXPECT_LT(gflops, 1e5);
  EXPECT_EQ(threads(), 2);
  EXPECT_GT(measure_matmul_peak(DType::kBf16, 1), 0.01);
  EXPECT_THROW((void)measure_matmul_peak(DType::kInt32, 1), InternalError);
  set_threads(1);
}

}  // namespace
}  // namespace capstan::device
