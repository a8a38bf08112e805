// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One rank as a process: fork, exec, wait, signal.
#pragma once
#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "capstan/base/descriptor.h"

namespace capstan::launch::internal {

struct RankCommand {
  int rank = 0;
  std::vector<std::string> arguments;    // [0] is looked up in PATH
  std::vector<std::string> environment;  // NAME=value
  int out = -1, err = -1;                // become descriptors 1 and 2
  int inherit = -1;                      // a descriptor that stays open under its number, -1 = none
};

struct Outcome {
  int exit_code = 0;  // when signal is 0
  int signal = 0;
  int64_t time_ns = 0;  // monotonic, when the launcher saw it
  [[nodiscard]] bool is_clean() const { return exit_code == 0 && signal == 0; }
};

class RankProcess {
 public:
  // Returns when the program has been loaded; throws EnvError when it cannot be.
  static RankProcess start(const RankCommand& command);

  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] int descriptor() const { return pidfd_.get(); }  // readable when the rank has ended
  // The outcome if the rank has ended; it is not reaped yet, so its process group keeps its number.
  [[nodiscard]] std::optional<Outcome> peek() const;
  void signal(int number) const;  // to the rank and what it started
  void kill_group() const;        // SIGKILL to the rank and what it started
  void reap();  // after peek() gave an outcome; also reaps what kill_group() left behind

 private:
  pid_t pid_ = -1;
  capstan::Descriptor pidfd_;
};

}  // namespace capstan::launch::internal
