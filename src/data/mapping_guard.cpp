// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "data/mapping_guard.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "capstan/base/error.h"

namespace capstan::data {
namespace {

struct Slot {
  std::atomic<uintptr_t> begin{0};  // 0 = free; written last, so a handler never sees half a slot
  std::atomic<size_t> size{0};
  std::array<char, 512> path{};  // the tail of a longer one
};
std::array<Slot, 1024> slots;
std::mutex slots_mutex;
struct sigaction previous_action;

// Everything below runs inside a signal handler: no allocation, no locks, no stdio.
void put(const char* text) {
  size_t left = std::strlen(text);
  while (left > 0) {
    const ssize_t done = ::write(STDERR_FILENO, text, left);
    if (done <= 0) return;
    text += done;
    left -= static_cast<size_t>(done);
  }
}

void put_number(uint64_t value) {
  std::array<char, 21> digits{};
  size_t at = digits.size() - 1;
  do {
    digits[--at] = static_cast<char>('0' + value % 10);
    value /= 10;
  } while (value > 0);
  put(&digits[at]);
}

const Slot* find_slot(uintptr_t address) {
  for (const Slot& slot : slots) {
    const uintptr_t begin = slot.begin.load(std::memory_order_acquire);
    if (begin == 0 || address < begin) continue;
    if (address - begin < slot.size.load(std::memory_order_relaxed)) return &slot;
  }
  return nullptr;
}

[[noreturn]] void report_and_exit(const Slot& slot, uintptr_t address) {
  put("error: [data] reading ");
  put(slot.path.data());
  put(" failed: got nothing at byte ");
  put_number(address - slot.begin.load(std::memory_order_relaxed));
  put(", need ");
  put_number(slot.size.load(std::memory_order_relaxed));
  put(" bytes (the file was cut, replaced or its disk failed while it was in use). Restore the "
      "file or prepare "
      "it again, then resume.\n");
  ::_exit(exit_codes::kIntegrity);
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (const Slot* slot = find_slot(address)) report_and_exit(*slot, address);
  if ((previous_action.sa_flags & SA_SIGINFO) != 0 && previous_action.sa_sigaction != nullptr) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
  } else {
    // Returning runs the faulting instruction again, now under the default action.
    ::signal(SIGBUS, SIG_DFL);
  }
}

void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, &previous_action);
  });
}

}  // namespace

MappingGuard::MappingGuard(std::span<const std::byte> bytes, const std::string& path) {
  if (bytes.empty()) return;
  install_handler();
  const std::lock_guard lock(slots_mutex);
  for (size_t i = 0; i < slots.size(); ++i) {
    Slot& slot = slots[i];
    if (slot.begin.load(std::memory_order_relaxed) != 0) continue;
    const size_t keep = std::min(path.size(), slot.path.size() - 1);
    std::memcpy(slot.path.data(), path.data() + (path.size() - keep), keep);
    slot.path[keep] = 0;
    slot.size.store(bytes.size(), std::memory_order_relaxed);
    slot.begin.store(reinterpret_cast<uintptr_t>(bytes.data()), std::memory_order_release);
    slot_ = static_cast<int>(i);
    return;
  }
}

MappingGuard::~MappingGuard() {
  if (slot_ < 0) return;
  const std::lock_guard lock(slots_mutex);
  slots[static_cast<size_t>(slot_)].begin.store(0, std::memory_order_release);
}

}  // namespace capstan::data
