// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>
#include <utility>

#include "kernels/api_table.h"
#include "kernels/device.h"
#include "kernels/simt/simt.h"

namespace capstan::kernels::test {
namespace {

constexpr size_t kAlignment = 16;
constexpr unsigned char kSlack = 0xa5;

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }
// Pages of the memory, without the one behind it that nobody may touch.
size_t mapped(size_t bytes) { return round_up(bytes + 1, page()); }

}  // namespace

const Api& api() { return kLinkedApi; }
std::optional<std::string> missing_device() { return std::nullopt; }
int repeats() { return 3; }
void begin_repeat(int repeat) { simt::set_order(static_cast<uint64_t>(repeat) * 7919); }

Memory::Memory(size_t bytes) : bytes_(bytes) {
  base_ = mmap(nullptr, mapped(bytes) + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
               -1, 0);
  if (base_ == MAP_FAILED) throw std::bad_alloc();
  auto* const end = static_cast<unsigned char*>(base_) + mapped(bytes);
  mprotect(end, page(), PROT_NONE);
  data_ = end - round_up(bytes, kAlignment);
  std::memset(data_, kSlack, round_up(bytes, kAlignment));
}

Memory::~Memory() {
  if (!base_) return;
  const auto* const bytes = static_cast<const unsigned char*>(data_);
  for (size_t i = bytes_; i < round_up(bytes_, kAlignment); ++i)
    EXPECT_EQ(bytes[i], kSlack) << "written " << i - bytes_ << " bytes behind the end";
  munmap(base_, mapped(bytes_) + page());
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      base_(std::exchange(other.base_, nullptr)),
      bytes_(other.bytes_) {}

void Memory::write(const void* from, size_t bytes) { std::memcpy(data_, from, bytes); }
void Memory::read(void* to, size_t bytes) const { std::memcpy(to, data_, bytes); }

}  // namespace capstan::kernels::test
