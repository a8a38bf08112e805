// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// When the gradients of a rank are summed over other ranks: one description that the engine follows
// and from which traffic and memory are counted. Pure data.
#pragma once
#include <vector>

#include "capstan/plan/layout.h"
#include "capstan/plan/schedule.h"

namespace capstan::plan {

enum class ReduceWhen { kStep, kMicroBatch };

// The backward of one block by one instruction has returned, its weight half included.
struct GradientPass {
  int instruction = 0;  // index into Schedule::ranks[pipeline rank]
  int block = 0;
  // RankLayout::buffers whose collected gradients are summed now, in this order.
  std::vector<int> complete;
  std::vector<bool> is_last;  // for each of them: the last sum of the step
};

// Passes in the order in which they return. kStep: a buffer is complete after the last pass that
// touches it. kMicroBatch: after every pass through its own block, and after its last pass. A tied
// head touches the embedding's buffer too, so passes are counted by buffer, not by chunk.
[[nodiscard]] std::vector<GradientPass> list_passes(const Schedule& schedule, int pipeline_rank,
                                                    const RankLayout& layout, bool tied_head,
                                                    ReduceWhen when);

}  // namespace capstan::plan
