// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "device/block_cache_internal.h"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "capstan/base/bytes.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace capstan::device {
namespace {

constexpr uint64_t kLive = 0xca57a11e0b10cfedULL, kFree = 0xca57a11edeadb10cULL;
constexpr int64_t kSlackBytes = 64 * kMiB;

size_t small_page() {
  static const size_t bytes = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

BlockHeader* new_header(void* place, SizeClass size) {
  auto* block = new (place) BlockHeader;
  block->magic = kLive;
  block->bytes = size.bytes;
  block->size_class = size.index;
  return block;
}

BlockHeader* allocate_small(SizeClass size) {
  void* place = nullptr;
  if (::posix_memalign(&place, kAlignment, sizeof(BlockHeader) + size.bytes) != 0) return nullptr;
  return new_header(place, size);
}

// Maps room for any alignment, then gives back what lies around [page of the header | block].
BlockHeader* allocate_large(SizeClass size) {
  const size_t page = small_page(), whole = size.bytes + kHugePage + page;
  void* mapping = ::mmap(nullptr, whole, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  auto* begin = static_cast<char*>(mapping);
  const auto address = reinterpret_cast<uintptr_t>(begin + page);
  char* data = begin + page + ((kHugePage - address % kHugePage) % kHugePage);
  char *first = data - page, *last = data + size.bytes;
  if (first > begin) ::munmap(begin, static_cast<size_t>(first - begin));
  if (last < begin + whole) ::munmap(last, static_cast<size_t>(begin + whole - last));
  ::madvise(data, size.bytes, MADV_HUGEPAGE);  // a hint: small pages are as right, only slower
  return new_header(data - sizeof(BlockHeader), size);
}

void free_to_system(BlockHeader* block) noexcept {
  const size_t bytes = block->bytes;
  ASAN_UNPOISON_MEMORY_REGION(BlockCache::data_of(block), bytes);
  if (bytes < kLargeBytes) {
    std::free(block);
    return;
  }
  char* data = static_cast<char*>(BlockCache::data_of(block));
  ::munmap(data - small_page(), bytes + small_page());
}

}  // namespace

SizeClass size_class_of(size_t bytes) {
  constexpr size_t kLinear = 512;  // below, every multiple of 64 is a class
  if (bytes <= kLinear) {
    const size_t steps = (bytes + kAlignment - 1) / kAlignment;
    return {static_cast<int>(steps), steps * kAlignment};
  }
  const int exponent = std::bit_width(bytes - 1) - 1;  // 2^exponent < bytes <= 2^(exponent + 1)
  const size_t step = size_t{1} << (exponent - 3);
  const size_t steps = (bytes - (size_t{1} << exponent) + step - 1) / step;  // 1 to 8
  return {8 + (exponent - 9) * 8 + static_cast<int>(steps), (size_t{1} << exponent) + steps * step};
}

BlockCache::BlockCache() : limit_(memory_limit_bytes() / 4) {}

BlockHeader* BlockCache::header_of(void* data) {
  auto* block = static_cast<BlockHeader*>(data) - 1;
  if (block->magic != kLive) {  // a double free or an overrun: going on would corrupt other tensors
    std::fputs(
        "error: [device] freeing CPU memory failed: the block was freed before or overwritten\n",
        stderr);
    std::abort();
  }
  return block;
}

BlockHeader* BlockCache::pop(FreeList& list) {
  std::lock_guard lock(list.mutex);
  list.last_use.store(clock_.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
  BlockHeader* block = list.head;
  if (block == nullptr) return nullptr;
  list.head = block->next;
  list.count.fetch_sub(1, std::memory_order_relaxed);
  return block;
}

BlockHeader* BlockCache::take(size_t bytes) {
  if (bytes > (size_t{1} << 47))
    throw EnvError(ErrorText{.module = "device",
                             .what = "allocating CPU memory",
                             .got = "a request of " + std::to_string(bytes) + " bytes",
                             .need = "at most 128 TiB",
                             .why = "a size was computed wrongly or is negative"});
  const SizeClass size = size_class_of(bytes);
  BlockHeader* block = pop(lists_[static_cast<size_t>(size.index)]);
  if (block != nullptr) {
    cached_.fetch_sub(static_cast<int64_t>(block->bytes), std::memory_order_relaxed);
    ASAN_UNPOISON_MEMORY_REGION(data_of(block), block->bytes);
    block->magic = kLive;
  } else {
    block = take_from_system(size);
  }
  block->next = nullptr;
  count_handed_out(static_cast<int64_t>(block->bytes));
  return block;
}

void BlockCache::count_handed_out(int64_t bytes) {
  const int64_t now = handed_out_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t peak = peak_handed_out_.load(std::memory_order_relaxed);
  while (now > peak &&
         !peak_handed_out_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
  }
}

BlockHeader* BlockCache::take_from_system(SizeClass size) {
  const bool large = size.bytes >= kLargeBytes;
  if (large) make_room(static_cast<int64_t>(size.bytes));
  const auto allocate = [&] { return large ? allocate_large(size) : allocate_small(size); };
  BlockHeader* block = allocate();
  if (block == nullptr) {
    release_all();
    block = allocate();
  }
  if (block == nullptr)
    throw EnvError(ErrorText{
        .module = "device",
        .what = "allocating " + format_bytes(static_cast<int64_t>(size.bytes)) + " of CPU memory",
        .got = std::string(std::strerror(errno)) + " with " + format_bytes(handed_out_) + " in use",
        .need = "",
        .why = "limit of this process: " + format_bytes(memory_limit_bytes()),
        .fix = "Use a smaller micro-batch or sequence length, or more ranks"});
  system_allocations_.fetch_add(1, std::memory_order_relaxed);
  return block;
}

// Keeps what the process maps within a quarter of its own peak of live bytes: before new memory is
// mapped, the classes unused for longest give theirs back. In a steady state nothing is mapped, so
// nothing is released.
void BlockCache::make_room(int64_t incoming_bytes) {
  for (int guard = 0; guard < kClasses; ++guard) {
    const int64_t live = handed_out_.load(std::memory_order_relaxed) + incoming_bytes;
    const int64_t peak = std::max(peak_handed_out_.load(std::memory_order_relaxed), live);
    const int64_t excess =
        live + cached_.load(std::memory_order_relaxed) - (peak + peak / 4 + kSlackBytes);
    if (excess <= 0) return;
    FreeList* oldest = nullptr;
    for (FreeList& list : lists_)
      if (list.count.load(std::memory_order_relaxed) > 0 &&
          (oldest == nullptr || list.last_use < oldest->last_use))
        oldest = &list;
    if (oldest == nullptr) return;
    release_list(*oldest, excess);
  }
}

int64_t BlockCache::release_list(FreeList& list, int64_t wanted) noexcept {
  int64_t released = 0;
  while (released < wanted) {
    BlockHeader* block = nullptr;
    {
      std::lock_guard lock(list.mutex);
      block = list.head;
      if (block == nullptr) break;
      list.head = block->next;
      list.count.fetch_sub(1, std::memory_order_relaxed);
    }
    released += static_cast<int64_t>(block->bytes);
    cached_.fetch_sub(static_cast<int64_t>(block->bytes), std::memory_order_relaxed);
    free_to_system(block);
  }
  return released;
}

void BlockCache::give_back(BlockHeader* block) noexcept {
  const auto bytes = static_cast<int64_t>(block->bytes);
  handed_out_.fetch_sub(bytes, std::memory_order_relaxed);
  block->magic = kFree;
  if (cached_.load(std::memory_order_relaxed) + bytes > limit_.load(std::memory_order_relaxed)) {
    free_to_system(block);
    return;
  }
  cached_.fetch_add(bytes, std::memory_order_relaxed);
  ASAN_POISON_MEMORY_REGION(data_of(block), block->bytes);
  FreeList& list = lists_[static_cast<size_t>(block->size_class)];
  std::lock_guard lock(list.mutex);
  block->next = list.head;
  list.head = block;
  list.count.fetch_add(1, std::memory_order_relaxed);
}

int64_t BlockCache::release_all() noexcept {
  int64_t released = 0;
  for (FreeList& list : lists_) released += release_list(list, INT64_MAX);
  return released;
}

}  // namespace capstan::device
