// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/passes.h"

#include <map>

namespace capstan::plan {
namespace {

// Buffers that the backward of a block writes to.
std::vector<int> touched(const RankLayout& layout, int block, bool reads_embedding) {
  std::vector<int> buffers;
  for (int i = 0; i < static_cast<int>(layout.buffers.size()); ++i) {
    const FlatBuffer& buffer = layout.buffers[static_cast<size_t>(i)];
    const bool is_touched = buffer.block == block || (reads_embedding && buffer.block == 0);
    if (buffer.trainable && is_touched) buffers.push_back(i);
  }
  return buffers;
}

bool ends_pass(Op op) { return op == Op::kBackward || op == Op::kBackwardWeight; }

}  // namespace

std::vector<GradientPass> list_passes(const Schedule& schedule, int pipeline_rank,
                                      const RankLayout& layout, bool tied_head, ReduceWhen when) {
  const auto& list = schedule.ranks.at(static_cast<size_t>(pipeline_rank));
  // The embedding is the only block below the first layer, the head the one above the last.
  const int head =
      tied_head && schedule.rank_of.back() == pipeline_rank ? layout.blocks.back() : -1;
  std::vector<GradientPass> passes;
  std::map<int, size_t> last_pass;  // by buffer
  for (int i = 0; i < static_cast<int>(list.size()); ++i) {
    const Instruction& work = list[static_cast<size_t>(i)];
    if (!ends_pass(work.op)) continue;
    const auto& blocks = layout.chunks.at(static_cast<size_t>(work.chunk));
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      for (const int buffer : touched(layout, *block, *block == head))
        last_pass[buffer] = passes.size();
      passes.push_back({i, *block, {}, {}});
    }
  }
  for (size_t p = 0; p < passes.size(); ++p)
    for (const int buffer : touched(layout, passes[p].block, passes[p].block == head)) {
      const bool is_last = last_pass.at(buffer) == p;
      const bool is_own = layout.buffers[static_cast<size_t>(buffer)].block == passes[p].block;
      if (!is_last && !(is_own && when == ReduceWhen::kMicroBatch)) continue;
      passes[p].complete.push_back(buffer);
      passes[p].is_last.push_back(is_last);
    }
  return passes;
}

}  // namespace capstan::plan
