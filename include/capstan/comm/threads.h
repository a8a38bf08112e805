// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ranks as threads of this process (`--ranks threads`, and most tests).
#pragma once
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "capstan/comm/communicator.h"

namespace capstan::comm {

// What the first rank that failed threw; exit codes are those of the cause.
class RankError : public Error {
 public:
  RankError(int rank, const std::string& message, std::exception_ptr cause);
  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] const std::exception_ptr& cause() const { return cause_; }
  int exit_code() const override { return exit_code_; }
  int run_exit_code() const override { return run_exit_code_; }
  const char* class_name() const override { return "RankError"; }

 private:
  int rank_;
  std::exception_ptr cause_;
  int exit_code_ = 1, run_exit_code_ = 91;
};

struct ThreadRanksOptions {
  double timeout_s = 600;    // deadline of every wait until a rank calls set_timeout
  int threads_per_rank = 1;  // at::set_num_threads of each rank's thread
};

// Runs fn(world) on n new threads, one per rank, and returns when all have ended. Each thread has
// its rank in the log and at::set_num_threads set. A rank that throws aborts the job; the first
// failure is thrown as RankError (exceptions that are no std::exception are rethrown as they are).
void run_thread_ranks(int n, const std::function<void(Communicator world)>& fn,
                      const ThreadRanksOptions& options = {});

// The world communicators of n ranks for callers that run the threads themselves; [r] belongs to
// rank r.
[[nodiscard]] std::vector<Communicator> make_thread_communicators(int n, double timeout_s = 600);

}  // namespace capstan::comm
