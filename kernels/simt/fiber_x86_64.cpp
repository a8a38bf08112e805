// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <vector>

#include "fiber.h"

extern "C" void capstan_simt_switch(void** save, void* load);

// Saves the registers that belong to the caller on the old stack and takes those of the new one.
asm(R"(
.text
.globl capstan_simt_switch
.type capstan_simt_switch, @function
capstan_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size capstan_simt_switch, . - capstan_simt_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace capstan::kernels::simt {
namespace {

constexpr uint64_t kCanary = 0x5afe57acc0ffee00u;
constexpr size_t kCanaryWords = 16;

}  // namespace

struct Fiber::State {
  std::unique_ptr<uint64_t[]> stack{new uint64_t[kFiberStackBytes / sizeof(uint64_t)]};
  void* own = nullptr;
  void* caller = nullptr;
};

Fiber::Fiber() : state_(std::make_unique<State>()) {
  for (size_t i = 0; i < kCanaryWords; ++i) state_->stack[i] = kCanary;
}
Fiber::~Fiber() = default;
Fiber::Fiber(Fiber&&) noexcept = default;
Fiber& Fiber::operator=(Fiber&&) noexcept = default;

void Fiber::reset(void (*start)()) {
  // start() finds the stack as after a call: 8 bytes off a multiple of 16.
  auto top = reinterpret_cast<uintptr_t>(&state_->stack[kFiberStackBytes / sizeof(uint64_t)]);
  auto* frame = reinterpret_cast<uint64_t*>(top / 16 * 16 - 64);
  for (int i = 0; i < 6; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<uint64_t>(start);
  frame[7] = 0;
  state_->own = frame;
}

void Fiber::resume() { capstan_simt_switch(&state_->caller, state_->own); }
void Fiber::pause() { capstan_simt_switch(&state_->own, state_->caller); }

bool Fiber::has_overflowed() const {
  for (size_t i = 0; i < kCanaryWords; ++i)
    if (state_->stack[i] != kCanary) return true;
  return false;
}

}  // namespace capstan::kernels::simt
