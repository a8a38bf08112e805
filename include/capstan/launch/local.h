// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Starts, watches and stops the ranks of one run on this machine.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "capstan/base/file.h"

namespace capstan::launch {

struct LocalLaunch {
  std::vector<std::string> command;  // program (looked up in PATH) and its arguments
  int nproc = 1;
  // <log_directory>/<rank>/{stdout.log,stderr.log,error.json,done}; created when missing.
  Path log_directory;
  // Of each log of each rank. Its first half is kept for good, of the rest the newest quarter and
  // what is being written (stdout.newest.log.1, stdout.newest.log); lines stay whole.
  int64_t log_limit_bytes = int64_t{64} << 20;
  std::string master_addr = "127.0.0.1";  // a numeric address of this machine
  double grace_s = 30;                    // from a stop signal to SIGKILL
  double crash_grace_s = 10;              // from the first failure to SIGKILL of the others
  bool tee_rank0 = true;  // rank 0's output also goes to this process's stdout and stderr
  std::map<std::string, std::string> environment;  // added to this process's own
  bool allow_nested = false;                       // start ranks although this process is one
};

// Why a run failed: the earliest rank that failed by itself.
struct RankFailure {
  int rank = 0;
  int exit_code = 0;       // 0 with signal 0: it left before the run had ended
  int signal = 0;          // that ended it; 0 = it exited
  std::string class_name;  // from error.json: "DataError", ...; may be empty
  std::string message;     // from error.json; may be empty
  std::string reason;      // what happened, in words
  Path log_directory;      // of this rank
  std::vector<std::string>
      last_lines;  // of stderr, or of stdout when stderr is empty; at most 20, escaped
};

struct LaunchResult {
  // 0 done; 90 preempted; the failing rank's own code if below 126, else 91; 128 + signal after a
  // stop signal that the ranks did not turn into a code of their own.
  int exit_code = 0;
  int stop_signal = 0;  // the last stop signal received (SIGTERM, SIGINT, SIGHUP), 0 = none
  std::optional<RankFailure> failure;
  std::vector<int> killed;  // ranks that did not stop within the grace
};

// Runs to the end of all ranks. To be called from the main thread or one that outlives the call,
// once at a time: it takes over SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 (those not ignored)
// and gives them back.
//  - Each rank is a process group of its own and dies with this process, even if that is killed.
//  - Ranks get RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, CAPSTAN_*
//  twins,
//    CAPSTAN_ERROR_FILE, CAPSTAN_GRACE_S and, unless set, OMP_NUM_THREADS. The port is bound before
//    any rank starts; rank 0 inherits the listening socket as descriptor CAPSTAN_STORE_FD.
//  - SIGTERM, SIGINT, SIGHUP are passed on once and start the grace; a second one kills at once.
//  SIGUSR1 and
//    SIGUSR2 are passed on as they come.
//  - The first failure stops all ranks. A rank that exits with 0 long before the others is a
//  failure unless it
//    has called declare_done() (rank_env.h).
// Throws ConfigError for a launch that makes no sense, EnvError when a rank cannot be started.
[[nodiscard]] LaunchResult run_local(const LocalLaunch& launch);

// For people: the cause, the last lines with `[rank N]` in front, the log folder. Empty without a
// failure.
[[nodiscard]] std::string describe(const LaunchResult& result);

// Creates and returns <logs>/attempt_<n> with the lowest n above all existing ones.
[[nodiscard]] Path make_attempt_directory(const Path& logs);

}  // namespace capstan::launch
