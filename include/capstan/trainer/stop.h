// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Stop requests: SIGTERM, SIGINT and SIGUSR1 ask the run to save and end; the handler only sets a
// flag. A second signal ends the process at once by that signal.
#pragma once

namespace capstan::trainer {

class StopSignals {
 public:
  StopSignals();   // installs the handlers; one object per process
  ~StopSignals();  // restores what was there
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
};
[[nodiscard]] int stop_signal();  // 0 = none so far
void request_stop(int signal);    // as if the signal had come; for embedders and tests
void clear_stop();

}  // namespace capstan::trainer
