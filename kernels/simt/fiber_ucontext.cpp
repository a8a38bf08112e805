// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ucontext.h>

#include <cstdint>

#include "fiber.h"

namespace capstan::kernels::simt {
namespace {

constexpr uint64_t kCanary = 0x5afe57acc0ffee00u;
constexpr size_t kCanaryWords = 16;
// Sanitizers make frames larger.
constexpr size_t kStackBytes = 4 * kFiberStackBytes;

}  // namespace

struct Fiber::State {
  std::unique_ptr<uint64_t[]> stack{new uint64_t[kStackBytes / sizeof(uint64_t)]};
  ucontext_t own{}, caller{};
};

Fiber::Fiber() : state_(std::make_unique<State>()) {
  for (size_t i = 0; i < kCanaryWords; ++i) state_->stack[i] = kCanary;
}
Fiber::~Fiber() = default;
Fiber::Fiber(Fiber&&) noexcept = default;
Fiber& Fiber::operator=(Fiber&&) noexcept = default;

void Fiber::reset(void (*start)()) {
  getcontext(&state_->own);
  state_->own.uc_stack.ss_sp = state_->stack.get();
  state_->own.uc_stack.ss_size = kStackBytes;
  state_->own.uc_link = nullptr;
  makecontext(&state_->own, start, 0);
}

void Fiber::resume() { swapcontext(&state_->caller, &state_->own); }
void Fiber::pause() { swapcontext(&state_->own, &state_->caller); }

bool Fiber::has_overflowed() const {
  for (size_t i = 0; i < kCanaryWords; ++i)
    if (state_->stack[i] != kCanary) return true;
  return false;
}

}  // namespace capstan::kernels::simt
