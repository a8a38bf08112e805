// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "ops/cpu/attention_pairs_blocks.h"

namespace capstan::ops::cpu {
namespace {

// _t: transposed. pairs: B operands, of the block's queries by the keys it sees.
struct PairBackwardScratch {
  uint16_t *rows, *keys_t, *values_t, *keys;
  uint16_t *queries, *queries_t, *grads, *grads_t, *block_pairs;
  uint16_t *ds_rows, *ds_pairs, *p_pairs;
  float *scores, *ds, *dq, *dk_t, *dv_t;
  PairBackwardScratch(const PairPlan& n, PairArena& arena)
      : rows(arena.halves(n.keys * n.width)),
        keys_t(arena.halves(n.keys * n.width)),
        values_t(arena.halves(n.keys * n.width)),
        keys(arena.halves(n.keys * n.width)),
        queries(arena.halves(kPairBlock * n.width)),
        queries_t(arena.halves(kPairBlock * n.width)),
        grads(arena.halves(kPairBlock * n.width)),
        grads_t(arena.halves(kPairBlock * n.width)),
        block_pairs(arena.halves(kPairBlock * n.width)),
        ds_rows(arena.halves(kPairBlock * n.score_row)),
        ds_pairs(arena.halves(kPairBlock * n.keys)),
        p_pairs(arena.halves(kPairBlock * n.keys)),
        scores(arena.floats(kPairBlock * n.score_row)),
        ds(arena.floats(kPairBlock * n.score_row)),
        dq(arena.floats(kPairBlock * n.width)),
        dk_t(arena.floats(n.keys * n.width)),
        dv_t(arena.floats(n.keys * n.width)) {}
};

// One row's probabilities from its scores and their gradients from do v^T, as what the products
// read: ds in rows, both in pairs. kHalf: the row's place in its pair.
template <int kHalf>
CAPSTAN_INLINE void pair_row(const AttentionArgs& a, const PairPlan& plan,
                             const PairBackwardScratch& s, const PairBlock& b, int64_t r) {
  const int64_t first_key = b.panel_begin * kPairSide;
  const int64_t columns = (b.panel_end - b.panel_begin) * kPairSide;
  const bool is_live = r < b.rows && b.runs[r].begin < b.runs[r].end;
  float delta = 0, lse = 0;
  float* const scores = s.scores + r * plan.score_row;
  const float* const ds = s.ds + r * plan.score_row;
  const auto scale = static_cast<float>(a.scale);
  if (is_live) {
    const auto* const out = head_of<const Bf16>(a.out, b.sample, b.first + r, b.head);
    const auto* const grad = reinterpret_cast<const Bf16*>(s.grads + r * plan.width);
    VecF32 sum{};
    for (int64_t d = 0; d < a.head_size; d += kPairPanel)
      sum += load_part(out + d, a.head_size - d) * load(grad + d);
    delta = sum_lanes(sum);
    lse = lse_of_block<float>(a, b)[r];
    scale_row(scores, columns, scale);
    mask_row(scores, columns, b.runs[r], first_key);
  }
  auto* const ds_row = reinterpret_cast<Bf16*>(s.ds_rows + r * plan.score_row);
  for (int64_t c = 0; c < columns; c += kPairPanel) {
    const VecF32 p = is_live ? exp_of(load(scores + c) - lse) : VecF32{};
    const VecF32 g = is_live ? p * (load(ds + c) - delta) * scale : VecF32{};
    store(ds_row + c, g);
    const int64_t pair = c * kPairBlock + r / 2 * 2 * kPairPanel;
    put_half<kHalf>(s.p_pairs + pair, p);
    put_half<kHalf>(s.ds_pairs + pair, g);
  }
}

// The block's queries or output gradients, as rows and transposed.
inline void pack_block(const Rows<Bf16>& x, int64_t width, uint16_t* pairs, uint16_t* rows,
                       uint16_t* transposed) {
  copy_padded(x, kPairBlock, width, rows);
  pack_pairs(rows, kPairBlock, width, pairs);
  unpack_transposed(pairs, kPairBlock, width, transposed);
}

// Gradients of keys and values: C^T += X^T pairs, from the first key on.
inline void add_transposed(const PairPlan& plan, int64_t columns, const uint16_t* x_t,
                           const uint16_t* pairs, float* sum_t) {
  multiply({.rows = plan.width,
            .columns = columns,
            .depth = kPairBlock,
            .a = x_t,
            .a_row = kPairBlock,
            .b = pairs,
            .b_panel = kPairBlock * kPairPanel,
            .c = sum_t,
            .c_row = plan.keys,
            .add = true});
}

inline void pair_backward_block(const AttentionArgs& a, const PairPlan& plan,
                                const PairBackwardScratch& s, const PairBlock& b) {
  const int64_t first_key = b.panel_begin * kPairSide;
  const int64_t columns = (b.panel_end - b.panel_begin) * kPairSide;
  pack_block(rows_of_block<Bf16>(a, a.q, b), plan.width, s.block_pairs, s.queries, s.queries_t);
  pack_block(rows_of_block<Bf16>(a, a.grad, b), plan.width, s.block_pairs, s.grads, s.grads_t);
  PairProduct scores{.rows = kPairBlock,
                     .columns = columns,
                     .depth = plan.width,
                     .a = s.queries,
                     .a_row = plan.width,
                     .b = s.keys_t + first_key * plan.width,
                     .b_panel = plan.width * kPairPanel,
                     .c = s.scores,
                     .c_row = plan.score_row,
                     .add = false};
  multiply(scores);
  scores.a = s.grads;
  scores.b = s.values_t + first_key * plan.width;
  scores.c = s.ds;
  multiply(scores);
  for (int64_t r = 0; r < kPairBlock; r += 2) {
    pair_row<0>(a, plan, s, b, r);
    pair_row<1>(a, plan, s, b, r + 1);
  }
  multiply({.rows = kPairBlock,
            .columns = plan.width,
            .depth = columns,
            .a = s.ds_rows,
            .a_row = plan.score_row,
            .b = s.keys + first_key * kPairPanel,
            .b_panel = plan.keys * kPairPanel,
            .c = s.dq,
            .c_row = plan.width,
            .add = false});
  store_rows<Bf16>(a.dq, b, {s.dq, plan.width, b.rows, a.head_size}, nullptr);
  add_transposed(plan, columns, s.grads_t, s.p_pairs, s.dv_t + first_key);
  add_transposed(plan, columns, s.queries_t, s.ds_pairs, s.dk_t + first_key);
}

inline void store_keys_transposed(const AttentionArgs& a, const HeadsView& view, const Task& task,
                                  const PairPlan& plan, const float* sum_t) {
  alignas(64) float block[kPairPanel * kPairPanel];
  for (int64_t key = 0; key < a.keys; key += kPairPanel)
    for (int64_t d = 0; d < a.head_size; d += kPairPanel) {
      transpose_16(reinterpret_cast<const uint32_t*>(sum_t + d * plan.keys + key), plan.keys,
                   reinterpret_cast<uint32_t*>(block), kPairPanel);
      for (int64_t i = 0; i < kPairPanel && key + i < a.keys; ++i) {
        auto* const to = head_of<Bf16>(view, task.sample, key + i, task.key_head);
        store_part(to + d, load(block + i * kPairPanel), a.head_size - d);
      }
    }
}

inline void pair_attention_backward(const AttentionArgs& a, int64_t task_begin, int64_t task_end,
                                    void* scratch) {
  const PairPlan plan(a);
  PairArena arena{{static_cast<float*>(scratch)}};
  PairBackwardScratch s(plan, arena);
  const int64_t sum = plan.keys * plan.width;
  [[maybe_unused]] const PairUnit unit;
  for (int64_t i = task_begin; i < task_end; ++i) {
    const Task task(a, i);
    if (a.partial) {
      s.dk_t = static_cast<float*>(a.partial) + 2 * i * sum;
      s.dv_t = s.dk_t + sum;
    }
    copy_padded(keys_of_task<Bf16>(a, a.v, task), plan.keys, plan.width, s.rows);
    pack_pairs_transposed(s.rows, plan.keys, plan.width, s.values_t);
    copy_padded(keys_of_task<Bf16>(a, a.k, task), plan.keys, plan.width, s.rows);
    pack_pairs_transposed(s.rows, plan.keys, plan.width, s.keys_t);
    pack_pairs(s.rows, plan.keys, plan.width, s.keys);
    __builtin_memset(s.dk_t, 0, static_cast<size_t>(sum) * sizeof(float));
    __builtin_memset(s.dv_t, 0, static_cast<size_t>(sum) * sizeof(float));
    for_each_block(a, task, [&](const PairBlock& b) { pair_backward_block(a, plan, s, b); });
    if (a.partial) continue;
    store_keys_transposed(a, a.dk, task, plan, s.dk_t);
    store_keys_transposed(a, a.dv, task, plan, s.dv_t);
  }
}

inline void pair_attention_sum_partials(const AttentionArgs& a, int64_t pair_begin,
                                        int64_t pair_end, void*) {
  const PairPlan plan(a);
  const int64_t both = 2 * plan.keys * plan.width;
  for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
    float* const total = static_cast<float*>(a.partial) + pair * a.splits * both;
    for (int64_t split = 1; split < a.splits; ++split)
      for (int64_t e = 0; e < both; e += kPairPanel)
        store(total + e, load(total + e) + load(total + split * both + e));
    const Task task(a, pair * a.splits);
    store_keys_transposed(a, a.dk, task, plan, total);
    store_keys_transposed(a, a.dv, task, plan, total + both / 2);
  }
}

}  // namespace
}  // namespace capstan::ops::cpu
