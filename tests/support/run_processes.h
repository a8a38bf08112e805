// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Programs as ranks, for tests: starts them with the environment a launcher gives, collects what
// they print, and leaves none behind.
#pragma once
#include <sys/types.h>

#include <map>
#include <string>
#include <vector>

namespace capstan::test {

struct ProcessOptions {
  std::string program;                     // empty: $CAPSTAN_RUN
  std::map<std::string, std::string> env;  // on top of this process's environment
  std::string directory;                   // working folder; empty: a temporary one
  double deadline_s = 60;                  // then all are killed and `timed_out` is set
  bool set_rank_env = true;                // RANK, WORLD_SIZE, ..., CAPSTAN_STORE_FD
  bool one_fails_all_end = false;          // SIGTERM to the others once one has failed
};

struct ProcessResult {
  int exit_code = -1;  // -1 when a signal ended it
  int signal = 0;
  std::string out, err;
  [[nodiscard]] std::string text() const;  // for failure messages
};

struct ProcessResults {
  std::vector<ProcessResult> ranks;
  bool timed_out = false;
  std::vector<pid_t> survivors;  // descendants that outlived the ranks by ten seconds; killed
  [[nodiscard]] bool all_succeeded() const;
  [[nodiscard]] std::string text() const;
};

// Starts n copies with the arguments (each rank in its own process group) and waits for all of
// them. `{rank}` in an argument becomes the rank. The store's port is a free one, whose listening
// socket rank 0 inherits. Reaps every child of the calling process, so no other children may be
// running.
[[nodiscard]] ProcessResults run_processes(int n, const std::vector<std::string>& args,
                                           const ProcessOptions& options = {});

}  // namespace capstan::test
