// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "capstan/base/log.h"
#include "device/block_cache_internal.h"

namespace capstan::device {
namespace {

struct alignas(kAlignment) Account {
  std::atomic<int64_t> current = 0, peak = 0, allocations = 0;

  void add(int64_t bytes) {
    const int64_t now = current.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    int64_t seen = peak.load(std::memory_order_relaxed);
    while (now > seen && !peak.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
    }
  }
};

std::atomic<int> g_default_rank = 0;

int account_index(int rank) { return std::clamp(rank, 0, kMaxRanks - 1); }

int current_account() {
  const int rank = log::thread_rank();
  return account_index(rank < 0 ? g_default_rank.load(std::memory_order_relaxed) : rank);
}

class CpuAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    BlockHeader* block = cache.take(bytes);
    block->rank = current_account();
    Account& account = accounts[static_cast<size_t>(block->rank)];
    account.add(static_cast<int64_t>(block->bytes));
    account.allocations.fetch_add(1, std::memory_order_relaxed);
    void* data = BlockCache::data_of(block);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t count) const override {
    default_copy_data(target, source, count);
  }
  static void release(void* data);

  BlockCache cache;
  std::array<Account, kMaxRanks> accounts;
};

// Never destroyed: tensors of static storage may outlive any object of ours.
CpuAllocator& the_allocator() {
  static auto* allocator = new CpuAllocator;
  return *allocator;
}

void CpuAllocator::release(void* data) {
  if (data == nullptr) return;
  CpuAllocator& self = the_allocator();
  BlockHeader* block = BlockCache::header_of(data);
  self.accounts[static_cast<size_t>(block->rank)].current.fetch_sub(
      static_cast<int64_t>(block->bytes), std::memory_order_relaxed);
  self.cache.give_back(block);
}

Account& account_of(int rank) {
  return the_allocator().accounts[static_cast<size_t>(account_index(rank))];
}

}  // namespace

void install_cpu_allocator() {
  static std::once_flag once;
  std::call_once(once, [] { c10::SetCPUAllocator(&the_allocator(), 255); });
}

bool is_cpu_allocator_installed() { return c10::GetCPUAllocator() == &the_allocator(); }

MemoryStats stats(int rank) {
  const Account& account = account_of(rank);
  return {.current_bytes = account.current,
          .peak_bytes = account.peak,
          .allocations = account.allocations};
}

CacheStats cache_stats() {
  const BlockCache& cache = the_allocator().cache;
  return {.handed_out_bytes = cache.handed_out_bytes(),
          .cached_bytes = cache.cached_bytes(),
          .system_allocations = cache.system_allocations()};
}

void reset_peak(int rank) {
  Account& account = account_of(rank);
  account.peak.store(account.current.load());
}

void charge(int rank, int64_t bytes) { account_of(rank).add(bytes); }
void set_default_rank(int rank) { g_default_rank = std::max(rank, 0); }
int64_t release_cached() { return the_allocator().cache.release_all(); }
void set_cache_limit(int64_t bytes) { the_allocator().cache.set_limit(bytes); }

}  // namespace capstan::device
