// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What both directions of attention_pairs.h share: sizes, scratch pieces, padded rows.
#pragma once
#include "ops/cpu/attention_blocks.h"
#include "ops/cpu/pair_operands.h"

namespace capstan::ops::cpu {
namespace {

constexpr int64_t kPairBlock = 64;  // queries of a block
using PairBlock = BlockOf<kPairBlock>;

struct PairPlan {
  int64_t keys, width;  // keys and head, padded
  int64_t score_row;    // row stride of scores: one vector more than keys, against cache conflicts

  explicit PairPlan(const AttentionArgs& a)
      : keys(round_to_side(a.keys)),
        width(round_to_side(a.head_size)),
        score_row(keys + kPairPanel) {}
};

// Hands out pieces of the thread's scratch, which is counted in fp32 numbers.
struct PairArena {
  Arena<float> arena;
  float* floats(int64_t count) { return arena.take(count); }
  uint16_t* halves(int64_t count) {
    return reinterpret_cast<uint16_t*>(arena.take((count + 1) / 2));
  }
};

// Rows x, zeros behind each and below all.
inline void copy_padded(const Rows<Bf16>& x, int64_t rows, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < rows; ++i, out += width) {
    const int64_t count = i < x.count ? x.width : 0;
    if (count > 0) __builtin_memcpy(out, x.data + i * x.stride, static_cast<size_t>(count) * 2);
    for (int64_t d = count; d < width; ++d) out[d] = 0;
  }
}

CAPSTAN_INLINE void scale_row(float* row, int64_t columns, float scale) {
  for (int64_t c = 0; c < columns; c += kPairPanel) store(row + c, load(row + c) * scale);
}

// Calls visit(b) for each block of queries of each head that shares the task's keys.
template <class Visit>
CAPSTAN_INLINE void for_each_block(const AttentionArgs& a, const Task& task, const Visit& visit) {
  const int64_t group = a.query_heads / a.key_heads;
  const int64_t blocks = (a.queries + kPairBlock - 1) / kPairBlock;
  PairBlock b;
  for (int64_t block = task.split; block < blocks; block += a.splits) {
    describe_block<kPairSide>(a, task.sample, block, b);
    for (int64_t g = 0; g < group; ++g) {
      b.head = task.key_head * group + g;
      visit(b);
    }
  }
}

}  // namespace
}  // namespace capstan::ops::cpu
