// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "ops/cpu/attention_forward.h"
#include "ops/cpu/attention_pairs_blocks.h"

namespace capstan::ops::cpu {
namespace {

struct PairForwardScratch {
  uint16_t *rows, *keys, *values, *queries, *p;
  float *scores, *out;
  PairForwardScratch(const PairPlan& n, PairArena& arena)
      : rows(arena.halves(n.keys * n.width)),
        keys(arena.halves(n.keys * n.width)),
        values(arena.halves(n.keys * n.width)),
        queries(arena.halves(kPairBlock * n.width)),
        p(arena.halves(kPairBlock * n.score_row)),
        scores(arena.floats(kPairBlock * n.score_row)),
        out(arena.floats(kPairBlock * n.width)) {}
};

inline void pair_forward_block(const AttentionArgs& a, const PairPlan& plan,
                               const PairForwardScratch& s, const PairBlock& b) {
  const int64_t first_key = b.panel_begin * kPairSide;
  const int64_t columns = (b.panel_end - b.panel_begin) * kPairSide;
  const int64_t rows = round_to_side(b.rows);
  copy_padded(rows_of_block<Bf16>(a, a.q, b), rows, plan.width, s.queries);
  multiply({.rows = rows,
            .columns = columns,
            .depth = plan.width,
            .a = s.queries,
            .a_row = plan.width,
            .b = s.keys + first_key * plan.width,
            .b_panel = plan.width * kPairPanel,
            .c = s.scores,
            .c_row = plan.score_row,
            .add = false});
  auto* const lse = lse_of_block<float>(a, b);
  float inverse[kPairBlock];
  for (int64_t r = 0; r < b.rows; ++r) {
    float* const row = s.scores + r * plan.score_row;
    scale_row(row, columns, static_cast<float>(a.scale));
    const auto result = softmax_row(row, columns, b.runs[r], first_key);
    lse[r] = result.lse;
    inverse[r] = result.inverse;
    auto* const p = reinterpret_cast<Bf16*>(s.p + r * plan.score_row);
    for (int64_t c = 0; c < columns; c += kPairPanel) store(p + c, load(row + c));
  }
  for (int64_t r = b.rows; r < rows; ++r)
    __builtin_memset(s.p + r * plan.score_row, 0, static_cast<size_t>(columns) * 2);
  multiply({.rows = rows,
            .columns = plan.width,
            .depth = columns,
            .a = s.p,
            .a_row = plan.score_row,
            .b = s.values + first_key * kPairPanel,
            .b_panel = plan.keys * kPairPanel,
            .c = s.out,
            .c_row = plan.width,
            .add = false});
  store_rows<Bf16>(a.out, b, {s.out, plan.width, b.rows, a.head_size}, inverse);
}

inline void pair_attention_forward(const AttentionArgs& a, int64_t task_begin, int64_t task_end,
                                   void* scratch) {
  const PairPlan plan(a);
  PairArena arena{{static_cast<float*>(scratch)}};
  const PairForwardScratch s(plan, arena);
  [[maybe_unused]] const PairUnit unit;
  for (int64_t i = task_begin; i < task_end; ++i) {
    const Task task(a, i);
    copy_padded(keys_of_task<Bf16>(a, a.k, task), plan.keys, plan.width, s.rows);
    pack_pairs_transposed(s.rows, plan.keys, plan.width, s.keys);
    copy_padded(keys_of_task<Bf16>(a, a.v, task), plan.keys, plan.width, s.rows);
    pack_pairs(s.rows, plan.keys, plan.width, s.values);
    for_each_block(a, task, [&](const PairBlock& b) { pair_forward_block(a, plan, s, b); });
  }
}

}  // namespace
}  // namespace capstan::ops::cpu
