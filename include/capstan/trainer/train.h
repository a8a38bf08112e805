// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One rank of a training run from resolved recipe to exit code: what `capstan train` runs on every
// rank, and what programs call that embed the trainer (examples/embed_trainer.cpp).
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/recipe/load.h"

namespace capstan::trainer {

struct TrainOptions {
  recipe::Resolved recipe;
  std::string resume = "auto";            // auto | none | a step folder
  std::vector<std::string> allow_change;  // keys that may differ from the checkpoint's recipe
  int local_size = 1;                     // ranks on this machine
  std::optional<int> attempt;             // default: the next free one
  bool console = true;                    // step lines on stdout (rank 0)
  std::string resume_command;             // printed when the run was stopped; "" = none
  // Called after every step on every rank with (finished steps, loss); for embedders and tests.
  std::function<void(int64_t step, double loss)> on_step;
};

struct TrainResult {
  int exit_code = 0;  // 0 done, 90 stopped by a signal after a checkpoint
  int64_t step = 0;
  double loss = 0;      // of the last step
  int stop_signal = 0;  // that asked for the end; 0 = none
  std::string run_directory;
};

// Every rank calls it with the same options. Throws what ends the run otherwise (see
// Error::run_exit_code). Collective over: world.
TrainResult train(const TrainOptions& options, const comm::Communicator& world);

// The same with `nproc` ranks as threads of this process. Returns rank 0's result; throws
// comm::RankError of the first rank that failed, which exit.json then tells of.
TrainResult train_as_threads(const TrainOptions& options, int nproc);

}  // namespace capstan::trainer
