// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A context of execution with its own stack. Two implementations: fiber_x86_64.cpp saves what the
// calling convention asks for, fiber_ucontext.cpp works everywhere.
#pragma once
#include <cstddef>
#include <memory>

namespace capstan::kernels::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(Fiber&&) noexcept;
  Fiber& operator=(Fiber&&) noexcept;
  // Next resume() calls start() on an empty stack; what ran before is dropped without unwinding.
  void reset(void (*start)());
  void resume();  // from the scheduler: runs the fiber until it pauses
  void pause();   // from the fiber: back to resume()'s caller
  [[nodiscard]] bool has_overflowed() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

inline constexpr size_t kFiberStackBytes = 64 * 1024;

}  // namespace capstan::kernels::simt
