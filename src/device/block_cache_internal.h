// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Blocks of memory by size class. A block is preceded by a 64-byte header that says what to do with
// it, so freeing needs no look-up. Blocks from kLargeBytes up are mappings of their own, aligned to
// 2 MiB for huge pages (the header then lies at the end of one extra small page); smaller ones come
// from malloc, aligned to 64.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace capstan::device {

inline constexpr size_t kAlignment = 64;
inline constexpr size_t kLargeBytes = size_t{1} << 20;
inline constexpr size_t kHugePage = size_t{2} << 20;
inline constexpr int kClasses = 384;

// Eight classes per power of two, multiples of 64: at most 12.5 % above `bytes` (or up to the next
// 64).
struct SizeClass {
  int index = 0;
  size_t bytes = 0;
};
[[nodiscard]] SizeClass size_class_of(size_t bytes);

struct alignas(kAlignment) BlockHeader {
  uint64_t magic = 0;
  size_t bytes = 0;  // usable, = the class's size
  int size_class = 0;
  int rank = 0;  // charged account
  BlockHeader* next = nullptr;
};
static_assert(sizeof(BlockHeader) == kAlignment);

class BlockCache {
 public:
  BlockCache();
  // A block of at least `bytes` > 0; throws EnvError when the system has none left.
  [[nodiscard]] BlockHeader* take(size_t bytes);
  void give_back(BlockHeader* block) noexcept;
  int64_t release_all() noexcept;
  void set_limit(int64_t bytes) { limit_ = bytes; }

  [[nodiscard]] int64_t handed_out_bytes() const { return handed_out_; }
  [[nodiscard]] int64_t cached_bytes() const { return cached_; }
  [[nodiscard]] int64_t system_allocations() const { return system_allocations_; }

  [[nodiscard]] static void* data_of(BlockHeader* block) { return block + 1; }
  [[nodiscard]] static BlockHeader* header_of(
      void* data);  // stops the program on a pointer that is not ours

 private:
  struct alignas(kAlignment) FreeList {
    std::mutex mutex;
    BlockHeader* head = nullptr;
    std::atomic<int64_t> count = 0;
    std::atomic<int64_t> last_use = 0;
  };
  [[nodiscard]] BlockHeader* pop(FreeList& list);
  [[nodiscard]] BlockHeader* take_from_system(SizeClass size);
  void make_room(int64_t incoming_bytes);
  int64_t release_list(FreeList& list, int64_t wanted) noexcept;
  void count_handed_out(int64_t bytes);

  std::array<FreeList, kClasses> lists_;
  std::atomic<int64_t> clock_ = 0;
  std::atomic<int64_t> handed_out_ = 0, peak_handed_out_ = 0, cached_ = 0, limit_;
  std::atomic<int64_t> system_allocations_ = 0;
};

}  // namespace capstan::device
