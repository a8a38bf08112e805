// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/allocator.h"

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "device/block_cache_internal.h"

namespace capstan::device {
namespace {

constexpr int64_t kMiBytes = int64_t{1} << 20;

class Allocator : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { install_cpu_allocator(); }
  void SetUp() override { log::set_thread_rank(7); }
  void TearDown() override {
    log::set_thread_rank(-1);
    release_cached();
  }
};

TEST_F(Allocator, InstallTwice_StaysOurs) {
  install_cpu_allocator();
  EXPECT_TRUE(is_cpu_allocator_installed());
  const at::Tensor t = at::empty({3}, at::kFloat);
  EXPECT_NE(t.data_ptr(), nullptr);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(t.data_ptr()) % 64, 0U);
}

TEST_F(Allocator, SizeClasses_AreOrderedAndWasteLittle) {
  size_t last_bytes = 0;
  int last_index = 0;
  for (size_t bytes = 1; bytes < (size_t{1} << 36); bytes += 1 + bytes / 37) {
    const SizeClass size = size_class_of(bytes);
    ASSERT_GE(size.bytes, bytes);
    ASSERT_EQ(size.bytes % 64, 0U);
    ASSERT_LE(size.bytes, std::max(bytes + 63, bytes + bytes / 8)) << bytes;
    ASSERT_GE(size.bytes, last_bytes);
    ASSERT_EQ(size.index == last_index, size.bytes == last_bytes) << bytes;
    ASSERT_EQ(size_class_of(size.bytes).index, size.index) << bytes;
    ASSERT_LT(size.index, kClasses);
    last_bytes = size.bytes;
    last_index = size.index;
  }
  EXPECT_LT(size_class_of(size_t{1} << 47).index, kClasses);
}

TEST_F(Allocator, LargeBlocks_LieOnHugePageBoundaries) {
  const at::Tensor t = at::empty({3 * kMiBytes}, at::kByte);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(t.data_ptr()) % kHugePage, 0U);
  t.fill_(1);  // every byte is ours to write
  EXPECT_EQ(t.sum().item<int64_t>(), 3 * kMiBytes);
}

TEST_F(Allocator, Counts_CurrentAndPeakAfterRounding) {
  const int64_t before = stats(7).current_bytes;
  reset_peak(7);
  {
    const at::Tensor a = at::empty({1000}, at::kByte);  // class 1024
    const at::Tensor b = at::empty({4 * kMiBytes}, at::kByte);
    EXPECT_EQ(stats(7).current_bytes - before, 1024 + 4 * kMiBytes);
  }
  EXPECT_EQ(stats(7).current_bytes, before);
  EXPECT_EQ(stats(7).peak_bytes - before, 1024 + 4 * kMiBytes);
  reset_peak(7);
  EXPECT_EQ(stats(7).peak_bytes, before);
}

TEST_F(Allocator, Charge_CountsMappedBuffers) {
  const int64_t before = stats(7).current_bytes;
  reset_peak(7);
  charge(7, 5000);
  charge(7, -5000);
  EXPECT_EQ(stats(7).current_bytes, before);
  EXPECT_EQ(stats(7).peak_bytes, before + 5000);
}

TEST_F(Allocator, FreedByAnotherThread_IsTakenOffTheRankThatAllocated) {
  const int64_t mine = stats(7).current_bytes, other = stats(8).current_bytes;
  auto t = std::make_unique<at::Tensor>(at::empty({2 * kMiBytes}, at::kByte));
  EXPECT_EQ(stats(7).current_bytes, mine + 2 * kMiBytes);
  std::thread([&] {
    log::set_thread_rank(8);
    t.reset();
  }).join();
  EXPECT_EQ(stats(7).current_bytes, mine);
  EXPECT_EQ(stats(8).current_bytes, other);
}

TEST_F(Allocator, ThreadWithoutRank_ChargesTheDefaultRank) {
  set_default_rank(9);
  const int64_t before = stats(9).current_bytes;
  std::thread([&] {
    log::set_thread_rank(-1);
    const at::Tensor t = at::empty({4096}, at::kByte);
    EXPECT_EQ(stats(9).current_bytes, before + 4096);
  }).join();
  set_default_rank(0);
}

TEST_F(Allocator, SteadyState_TakesNothingFromTheSystem) {
  const auto step = [] {
    std::vector<at::Tensor> live;
    for (int i = 1; i <= 12; ++i) live.push_back(at::zeros({i * 300000}, at::kFloat));
    return live.back().sum().item<float>();
  };
  step();
  const int64_t taken = cache_stats().system_allocations;
  for (int i = 0; i < 20; ++i) step();
  EXPECT_EQ(cache_stats().system_allocations, taken);
}

TEST_F(Allocator, RepeatedShapes_GetTheSameMemoryBack) {
  void* first = at::empty({kMiBytes}, at::kFloat).data_ptr();
  EXPECT_EQ(at::empty({kMiBytes}, at::kFloat).data_ptr(), first);
}

TEST_F(Allocator, ChangingShapes_KeepTheCacheNearThePeakOfLiveBytes) {
  release_cached();
  const int64_t base = cache_stats().handed_out_bytes;
  int64_t peak = 0;
  for (int i = 0; i < 400;
       ++i) {  // never the same class for long: a plain cache would keep them all
    const at::Tensor t = at::empty({(16 + i % 64) * kMiBytes}, at::kByte);
    peak = std::max(peak, cache_stats().handed_out_bytes - base);
    ASSERT_LE(cache_stats().handed_out_bytes + cache_stats().cached_bytes,
              base + peak + (base + 256 * kMiBytes) / 4 + 80 * kMiBytes);
  }
}

TEST_F(Allocator, ReleaseAndLimit_GiveMemoryBack) {
  { const at::Tensor t = at::empty({32 * kMiBytes}, at::kByte); }
  EXPECT_GE(cache_stats().cached_bytes, 32 * kMiBytes);
  EXPECT_GE(release_cached(), 32 * kMiBytes);
  EXPECT_EQ(cache_stats().cached_bytes, 0);
  set_cache_limit(0);
  { const at::Tensor t = at::empty({32 * kMiBytes}, at::kByte); }
  EXPECT_EQ(cache_stats().cached_bytes, 0);
  set_cache_limit(int64_t{1} << 40);
}

TEST_F(Allocator, RawInterfaceAndResize_Work) {
  c10::Allocator* allocator = c10::GetCPUAllocator();
  ASSERT_NE(allocator->raw_deleter(), nullptr);
  void* raw = allocator->raw_allocate(100);
  std::memset(raw, 1, 100);
  allocator->raw_deallocate(raw);
  EXPECT_EQ(allocator->raw_allocate(0), nullptr);
  at::Tensor t = at::arange(10, at::kLong);
  t.resize_({2000000});
  EXPECT_EQ(t[9].item<int64_t>(), 9);
  EXPECT_EQ(at::empty({0}).numel(), 0);
}

TEST_F(Allocator, AbsurdSize_IsRefusedByName) {
  try {
    const at::Tensor t = at::empty({int64_t{1} << 50}, at::kByte);
    FAIL() << "allocated a petabyte";
  } catch (const std::exception& e) {
    EXPECT_NE(std::string(e.what()).find("allocating CPU memory"), std::string::npos) << e.what();
  }
}

TEST_F(Allocator, ManyThreads_KeepBlocksApartAndTheBooksStraight) {
  const int64_t before = stats(7).current_bytes;
  std::vector<std::thread> threads;
  std::atomic<int> damaged = 0;
  for (int id = 0; id < 4; ++id)
    threads.emplace_back([id, &damaged] {
      log::set_thread_rank(7);
      std::mt19937 random(static_cast<unsigned>(id));
      std::vector<at::Tensor> live;
      for (int i = 0; i < 3000; ++i) {
        const auto bytes = static_cast<int64_t>(random() % 5000) + 1;
        live.push_back(at::full({bytes}, id, at::kByte));
        if (live.size() <= 20) continue;
        const auto victim = random() % live.size();
        if (!live[victim].eq(id).all().item<bool>()) ++damaged;
        live.erase(live.begin() + static_cast<std::ptrdiff_t>(victim));
      }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(damaged, 0);
  EXPECT_EQ(stats(7).current_bytes, before);
}

TEST_F(Allocator, FreeingTwice_StopsTheProgram) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        install_cpu_allocator();
        c10::Allocator* allocator = c10::GetCPUAllocator();
        void* raw = allocator->raw_allocate(100);
        allocator->raw_deallocate(raw);
        allocator->raw_deallocate(raw);
      },
      "freed before");
}

}  // namespace
}  // namespace capstan::device
