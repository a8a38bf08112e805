// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The part of a job that knows who waits for whom, for backends whose operations run elsewhere than
// in the job itself. One per rank. Thread-safe.
#pragma once
#include <exception>
#include <functional>
#include <map>
#include <string>

#include "capstan/comm/communicator.h"

namespace capstan::comm {

// A wait as other ranks need to see it: which of them have come is told by their counters.
struct WaitNote {
  std::string title;
  int64_t sequence = 0;
  std::map<int, std::string> counters;  // world rank -> its counter that must exceed `sequence`
};

struct WaitFailure {
  std::string title;  // of the operation
  std::string got;    // what went wrong, unless its deadline passed
  std::string fix;
  bool deadline_passed = false;
};

class WaitBook {
 public:
  virtual ~WaitBook() = default;
  virtual void count(const std::string& counter) = 0;  // this rank has come to one more operation
  // `wake` is called when the job is aborted, if the wait is not cleared by then.
  [[nodiscard]] virtual int64_t note_wait(WaitNote note, std::function<void()> wake) = 0;
  virtual void clear_wait(int64_t id) = 0;
  // Finds out why, aborts the job and returns what the waiter shall see: an AbortedError where
  // another rank failed first.
  [[nodiscard]] virtual std::exception_ptr fail(const WaitFailure& failure,
                                                const WaitNote& note) = 0;
  virtual void abort(const std::string& reason) noexcept = 0;
  [[nodiscard]] virtual bool is_aborted() const = 0;
  [[nodiscard]] virtual AbortedError aborted_error(const std::string& where) const = 0;
};

}  // namespace capstan::comm
