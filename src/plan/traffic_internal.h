// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Parts of predict_traffic. Bytes are what a rank hands in (a receive: what it takes), as
// comm::Ledger counts them.
#pragma once
#include <algorithm>

#include "capstan/plan/plan.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {

// What all parts read, and where they add.
struct TrafficCount {
  const Plan& plan;
  const RankLayout& layout;
  int pipeline_rank = 0;
  Traffic traffic = {};

  // Axes of one rank carry nothing.
  void add(AxisSet axes, const char* op, int64_t calls, int64_t bytes_per_call) {
    if (calls <= 0 || plan.grid.size_of(axes) == 1) return;
    TrafficEntry& entry = traffic[name_of(axes) + "/" + op];
    entry.calls += calls;
    entry.bytes = std::min(entry.bytes + saturating_multiply(calls, bytes_per_call), kSaturated);
  }
};

// Activations and their gradients between stages.
void count_transfers(TrafficCount& count);
// Tensor, context and expert axes: what the blocks exchange in forward, recompute and backward.
void count_blocks(TrafficCount& count);
// Gradient sums, and weights that are gathered.
void count_sums(TrafficCount& count);
void count_gathers(TrafficCount& count);

}  // namespace capstan::plan
