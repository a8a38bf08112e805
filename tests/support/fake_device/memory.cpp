// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "support/fake_device/capture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/regions.h"

namespace capstan::test::fake {
namespace {

constexpr size_t kRangeBytes = size_t{64} << 30;
constexpr size_t kRoundBytes = 512;
constexpr size_t kGuardBytes = 512;  // behind every block
constexpr char kNaNByte = '\xFF';

struct Block {
  size_t bytes = 0, asked_bytes = 0;
  int stream = 0;
  std::thread::id owner;  // who allocated it
  int64_t allocation = 0;
  bool is_free = false;
  int pool = 0;
  bool is_of_graph = false;  // allocated during a capture: stays
  std::vector<int> kept_for;
  std::vector<Access> awaited;  // ops of kept_for streams at the time it was freed
  RegionHistory history;

  [[nodiscard]] bool is_there() const { return !is_free || is_of_graph; }
  [[nodiscard]] bool is_mine() const { return is_there() && owner == std::this_thread::get_id(); }
};

// Where this thread allocates from, on which stream.
thread_local int thread_pool = 0, pool_stream = 0;

char* reserve(int protection) {
  void* const range =
      mmap(nullptr, kRangeBytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(range != MAP_FAILED, "the fake device cannot reserve its address range");
  return static_cast<char*>(range);
}

class Memory {
 public:
  void* allocate(size_t asked_bytes) {
    if (asked_bytes == 0) return nullptr;
    const size_t bytes = (asked_bytes + kRoundBytes - 1) / kRoundBytes * kRoundBytes;
    std::lock_guard lock(state_mutex());
    TORCH_CHECK_WITH(OutOfMemoryError, allocated_ + bytes <= limit_,
                     "fake device out of memory: tried to allocate ", bytes, " bytes; ", allocated_,
                     " of ", limit_, " bytes are in use");
    const int stream = current_stream(), pool = stream == pool_stream ? thread_pool : 0;
    auto block = find_free(bytes, stream, pool);
    if (block == blocks_.end()) block = take_new(bytes, stream, pool);
    block->second.is_free = false;
    block->second.owner = std::this_thread::get_id();
    block->second.allocation = ++allocations_;
    // Tensors of a graph that take turns in a block all write to it in a launch.
    block->second.asked_bytes =
        block->second.is_of_graph ? std::max(block->second.asked_bytes, asked_bytes) : asked_bytes;
    block->second.is_of_graph |= is_capturing();
    block->second.history.restart(bytes, last_op(stream, "allocation"));
    allocated_ += bytes;
    peak_ = std::max(peak_, allocated_);
    return device_ + block->first;
  }

  void free(const void* pointer) {
    std::lock_guard lock(state_mutex());
    const size_t begin = offset_of(pointer);
    Block& block = blocks_.at(begin);
    check_guard(begin, block);
    std::memset(host_ + begin, kNaNByte, block.bytes);
    for (const int stream : block.kept_for) block.awaited.push_back(last_op(stream, "keep_for"));
    block.kept_for.clear();
    block.is_free = true;
    allocated_ -= block.bytes;
    free_.emplace(std::tuple(block.pool, block.stream, block.bytes), begin);
  }

  // The block around a pointer and the pointer's place in it.
  std::pair<Block*, size_t> find(const void* pointer) {
    const size_t place = offset_of(pointer);
    auto block = blocks_.upper_bound(place);
    TORCH_CHECK(block != blocks_.begin(), "not memory of the fake device");
    --block;
    TORCH_CHECK(place < block->first + block->second.bytes && block->second.is_there(),
                "freed memory of the fake device is used");
    return {&block->second, place - block->first};
  }

  // For kernels: a live block, or a place just behind one (of a tensor without elements).
  void check_live(const void* pointer) {
    const size_t place = offset_of(pointer);
    const auto block = std::prev(blocks_.upper_bound(place));
    TORCH_CHECK(block->second.is_there(), "freed memory of the fake device is used");
  }

  [[nodiscard]] bool contains(const void* pointer) const {
    return pointer >= device_ && pointer < device_ + kRangeBytes;
  }
  [[nodiscard]] size_t offset_of(const void* pointer) const {
    TORCH_CHECK(contains(pointer), "not a pointer of the fake device");
    return static_cast<size_t>(static_cast<const char*>(pointer) - device_);
  }
  [[nodiscard]] void* host_of(const void* pointer) const { return host_ + offset_of(pointer); }
  void set_limit(int64_t bytes) { limit_ = std::min(static_cast<size_t>(bytes), kRangeBytes); }
  void reset_peak() { peak_ = allocated_; }
  [[nodiscard]] Snapshot snapshot() const {
    Snapshot saved;
    for (const auto& [begin, block] : blocks_)
      if (block.is_mine())
        saved[begin] = {block.allocation, {host_ + begin, host_ + begin + block.bytes}};
    return saved;
  }
  void restore(const Snapshot& saved) {
    for (const auto& [begin, block] : blocks_) {
      if (!block.is_mine()) continue;
      const auto found = saved.find(begin);
      if (found == saved.end() || found->second.allocation != block.allocation)
        std::memset(host_ + begin, kNaNByte, block.bytes);
      else
        std::memcpy(host_ + begin, found->second.bytes.data(), block.bytes);
    }
  }

  void add_graph(int pool) { ++graphs_[pool]; }
  void remove_graph(int pool) {
    if (--graphs_[pool] > 0) return;
    for (auto& [begin, block] : blocks_) {
      if (block.pool != pool || !std::exchange(block.is_of_graph, false)) continue;
      if (block.is_free) std::memset(host_ + begin, kNaNByte, block.bytes);
    }
  }
  [[nodiscard]] bool has_graphs(int pool) { return graphs_[pool] > 0; }

  [[nodiscard]] device::DeviceMemory stats() const {
    const auto i = [](size_t bytes) { return static_cast<int64_t>(bytes); };
    return {.free_bytes = i(limit_ - allocated_),
            .total_bytes = i(limit_),
            .allocated_bytes = i(allocated_),
            .peak_bytes = i(peak_),
            .reserved_bytes = i(reserved_),
            .peak_reserved_bytes = i(reserved_)};
  }

 private:
  using Blocks = std::map<size_t, Block>;

  Blocks::iterator find_free(size_t bytes, int stream, int pool) {
    const auto [first, last] = free_.equal_range({pool, stream, bytes});
    for (auto f = last; f != first;) {  // the one freed last
      const auto block = blocks_.find((--f)->second);
      auto& awaited = block->second.awaited;
      if (!std::all_of(awaited.begin(), awaited.end(),
                       [&](const Access& op) { return is_ordered(op, stream); }))
        continue;
      awaited.clear();
      block->second.history.check_reuse(stream);
      free_.erase(f);
      return block;
    }
    return blocks_.end();
  }

  // Called when freeing, which cannot throw.
  void check_guard(size_t begin, const Block& block) const {
    const char* const first = host_ + begin + block.asked_bytes;
    const char* const last = host_ + begin + block.bytes + kGuardBytes;
    if (std::all_of(first, last, [](char byte) { return byte == kNaNByte; })) return;
    fmt::print(stderr, "fake device: something wrote past the end of {} bytes of memory\n",
               block.asked_bytes);
    std::abort();
  }

  Blocks::iterator take_new(size_t bytes, int stream, int pool) {
    TORCH_CHECK_WITH(OutOfMemoryError, used_ + bytes + kGuardBytes <= kRangeBytes,
                     "the fake device's address range is used up");
    const Block made{.bytes = bytes, .stream = stream, .pool = pool};
    const auto block = blocks_.emplace(used_, made).first;
    std::memset(host_ + used_, kNaNByte, bytes + kGuardBytes);
    used_ += bytes + kGuardBytes;
    if (pool != kScratch) reserved_ += bytes + kGuardBytes;
    return block;
  }

  char* const device_ = reserve(PROT_NONE);
  char* const host_ = reserve(PROT_READ | PROT_WRITE);
  size_t used_ = 0, reserved_ = 0, allocated_ = 0, peak_ = 0, limit_ = kRangeBytes;
  Blocks blocks_;
  std::multimap<std::tuple<int, int, size_t>, size_t> free_;  // pool, stream, bytes -> offset
  int64_t allocations_ = 0;
  std::map<int, int> graphs_;  // of a pool
};

Memory& memory() {
  static auto* const instance = new Memory;
  return *instance;
}

class DeviceAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const pointer = memory().allocate(bytes);
    return {pointer, pointer, &release, fake_device()};
  }
  [[nodiscard]] c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(memory().host_of(to), memory().host_of(from), bytes);
  }

 private:
  static void release(void* pointer) {
    if (pointer) memory().free(pointer);
  }
};

std::map<const char*, size_t>& pinned_ranges() {
  static auto* const instance = new std::map<const char*, size_t>;
  return *instance;
}

class PinnedAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    constexpr size_t kAlign = 64;
    const size_t rounded = std::max(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
    void* const pointer = std::aligned_alloc(kAlign, rounded);
    TORCH_CHECK(pointer, "out of pinned memory");
    std::memset(pointer, kNaNByte, rounded);
    std::lock_guard lock(state_mutex());
    pinned_ranges()[static_cast<const char*>(pointer)] = rounded;
    return {pointer, pointer, &release, c10::Device(c10::kCPU)};
  }
  [[nodiscard]] c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

 private:
  static void release(void* pointer) {
    std::lock_guard lock(state_mutex());
    pinned_ranges().erase(static_cast<const char*>(pointer));
    std::free(pointer);
  }
};

}  // namespace

c10::Allocator* device_allocator() {
  static auto* const instance = new DeviceAllocator;
  return instance;
}

c10::Allocator* pinned_allocator() {
  static auto* const instance = new PinnedAllocator;
  return instance;
}

void hold_at_once(const std::vector<int64_t>& bytes) {
  std::vector<c10::DataPtr> held;
  for (const int64_t b : bytes)
    held.push_back(device_allocator()->allocate(static_cast<size_t>(b)));
}

bool is_device_pointer(const void* pointer) { return memory().contains(pointer); }

int64_t pinned_bytes(int64_t smallest) {
  std::lock_guard lock(state_mutex());
  int64_t sum = 0;
  for (const auto& [begin, bytes] : pinned_ranges())
    if (static_cast<int64_t>(bytes) >= smallest) sum += static_cast<int64_t>(bytes);
  return sum;
}

bool is_pinned(const void* pointer) {
  std::lock_guard lock(state_mutex());
  const auto* const p = static_cast<const char*>(pointer);
  auto range = pinned_ranges().upper_bound(p);
  if (range == pinned_ranges().begin()) return false;
  --range;
  return p < range->first + range->second;
}

void note(const std::vector<Use>& uses, const Access& now) {
  std::lock_guard lock(state_mutex());
  const auto for_each = [&](auto method) {
    for (const Use& use : uses) {
      if (!use.tensor.defined() || use.tensor.numel() == 0) continue;
      const auto [block, place] = memory().find(use.tensor.storage().data());
      for (const Region region : regions_of(use.tensor))
        (block->history.*method)({region.begin + place, region.end + place}, use.is_write, now);
    }
  };
  for_each(&RegionHistory::check);
  for_each(&RegionHistory::remember);
}

void note(const void* pointer, size_t bytes, bool is_write, const Access& now) {
  if (bytes == 0) return;
  std::lock_guard lock(state_mutex());
  const auto [block, place] = memory().find(pointer);
  TORCH_CHECK(place + bytes <= block->asked_bytes, now.op, " goes past the end of its memory");
  block->history.check({place, place + bytes}, is_write, now);
  block->history.remember({place, place + bytes}, is_write, now);
}

void keep_for(const void* pointer, int stream) {
  if (!pointer) return;
  std::lock_guard lock(state_mutex());
  memory().find(pointer).first->kept_for.push_back(stream);
}

void allocate_from(int pool, int stream) {
  thread_pool = pool;
  pool_stream = stream;
}

void add_graph(int pool) {
  std::lock_guard lock(state_mutex());
  memory().add_graph(pool);
}

void remove_graph(int pool) {
  std::lock_guard lock(state_mutex());
  memory().remove_graph(pool);
}

bool has_graphs(int pool) {
  std::lock_guard lock(state_mutex());
  return memory().has_graphs(pool);
}

device::DeviceMemory memory_stats() {
  std::lock_guard lock(state_mutex());
  return memory().stats();
}

Snapshot snapshot() {
  std::lock_guard lock(state_mutex());
  return memory().snapshot();
}

void restore(const Snapshot& blocks) {
  std::lock_guard lock(state_mutex());
  memory().restore(blocks);
}

void reset_peak() {
  std::lock_guard lock(state_mutex());
  memory().reset_peak();
}

}  // namespace capstan::test::fake

namespace capstan::test {

void* host_of(const void* device_pointer) {
  if (!device_pointer) return nullptr;
  std::lock_guard lock(fake::state_mutex());
  fake::memory().check_live(device_pointer);
  return fake::memory().host_of(device_pointer);
}

void set_fake_memory_bytes(int64_t bytes) {
  std::lock_guard lock(fake::state_mutex());
  fake::memory().set_limit(bytes);
}

}  // namespace capstan::test
