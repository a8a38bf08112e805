// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Pipeline schedules as data: one instruction list per pipeline rank. The engine runs it, the
// simulator times it. A new schedule is one function in src/plan.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace capstan::plan {

enum class Op {
  kForward,
  kBackward,        // input and weight gradients
  kBackwardInput,   // zero-bubble: B
  kBackwardWeight,  // zero-bubble: W
  kSendActivation,
  kReceiveActivation,
  kSendGradient,
  kReceiveGradient,
  kReduce,  // gradients of `chunk` are final on this rank: its reductions may be issued
  kStep,    // optimizer
};
[[nodiscard]] const char* name_of(Op op);

struct Instruction {
  Op op = Op::kForward;
  int chunk = 0;  // index into the rank's chunks
  int micro_batch = 0;
  int peer = -1;  // pipeline rank, sends and receives
  int group = 0;  // equal adjacent groups are issued together
  bool operator==(const Instruction&) const = default;
};

enum class Pass { kTrain, kForwardOnly, kDecode };

struct Schedule {
  std::string name;  // "gpipe"
  Pass pass = Pass::kTrain;
  int stages = 1, micro_batches = 1;
  std::vector<std::vector<Instruction>> ranks;  // by pipeline rank
  std::vector<std::vector<int>> stage_of;       // [pipeline rank][chunk] -> stage
  std::vector<int> rank_of;                     // [stage] -> pipeline rank
};

[[nodiscard]] std::vector<std::string> schedule_names();  // kinds of this build

// `stages` counts all stages, `chunks` those of one rank, so there are stages / chunks pipeline
// ranks. With one stage micro-batches run one after the other (forward, backward, forward, ...):
// there is no pipeline to fill, and only one micro-batch's activations are held. Throws ConfigError
// for a kind this build does not have.
[[nodiscard]] Schedule build_schedule(const std::string& kind, Pass pass, int stages,
                                      int micro_batches, int chunks);
// Complete, ordered, deadlock-free under rendezvous sends, FIFO per channel. Empty = legal.
[[nodiscard]] std::vector<std::string> check_schedule(const Schedule& schedule);
// Largest number of micro-batches whose activations a pipeline rank holds at once.
[[nodiscard]] int peak_in_flight(const Schedule& schedule, int pipeline_rank);
// One line of text per pipeline rank, e.g. `rank 0 | F0 B0 F1 B1 reduce step`; long lists are
// shortened in the middle.
[[nodiscard]] std::string draw_schedule(const Schedule& schedule, int columns = 96);

}  // namespace capstan::plan
