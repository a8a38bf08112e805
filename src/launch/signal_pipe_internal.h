// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Signals as bytes of a pipe, so that one poll() waits for everything.
#pragma once
#include <signal.h>

#include <array>
#include <optional>

#include "capstan/base/descriptor.h"

namespace capstan::launch::internal {

// Takes over the launcher's signals for its life; a signal that was ignored (nohup) stays ignored.
// One at a time.
class SignalPipe {
 public:
  SignalPipe();
  ~SignalPipe();
  SignalPipe(const SignalPipe&) = delete;
  SignalPipe& operator=(const SignalPipe&) = delete;
  [[nodiscard]] int descriptor() const { return read_end_.get(); }
  [[nodiscard]] std::optional<int> next();  // nullopt when none is pending

 private:
  static constexpr std::array<int, 5> kSignals = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2};
  capstan::Descriptor read_end_, write_end_;
  std::array<struct sigaction, 5> before_ = {};
};

}  // namespace capstan::launch::internal
