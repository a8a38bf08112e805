// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the files that build, check, simulate and draw schedules share.
#pragma once
#include <string>
#include <vector>

#include "capstan/plan/schedule.h"

namespace capstan::plan::schedules {

using List = std::vector<Instruction>;

struct Shape {
  Pass pass = Pass::kTrain;
  int ranks = 1, micro_batches = 1, chunks = 1;
};

// One kind of schedule: which chunks it has, where its stages live, and in which order a rank
// computes. Transfers, reductions and the step are added by complete_lists.
struct Kind {
  const char* name;
  int least_chunks, most_chunks;
  bool in_rounds;  // training needs whole rounds of one micro-batch per rank
  List (*order)(const Shape& shape, int rank);
};
[[nodiscard]] const std::vector<Kind>& kinds();
// Stage of a rank's chunk.
[[nodiscard]] int place(const Kind& kind, const Shape& shape, int rank, int chunk);

// Adds transfers, reductions and the step to the computations of all ranks and fills
// schedule.ranks; stage_of and rank_of are given.
void complete_lists(Schedule& schedule, const std::vector<List>& orders);

[[nodiscard]] inline bool is_compute(Op op) {
  return op == Op::kForward || op == Op::kBackward || op == Op::kBackwardInput ||
         op == Op::kBackwardWeight;
}
[[nodiscard]] inline bool is_gradient(Op op) {
  return op == Op::kSendGradient || op == Op::kReceiveGradient;
}
// First-in first-out channels of a schedule, one per ordered pair of neighbouring ranks and kind of
// value. The index of the channel that carries the activations of `stage` to the next stage, or its
// gradients to the one before; -1 where the neighbour is on the same rank or missing.
struct Channels {
  explicit Channels(const Schedule& schedule);
  int count = 0;
  std::vector<int> activation_of, gradient_of;  // [sending stage]
  // The channel of a transfer that `stage` takes part in.
  [[nodiscard]] int of(Op op, int stage) const;
};

// "F3", "B3", "I3", "W3"; with the chunk behind a point where a rank has several.
[[nodiscard]] std::string compute_label(const Instruction& instruction, bool chunked);

}  // namespace capstan::plan::schedules
