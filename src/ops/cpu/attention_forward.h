// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Forward of the attention kernels, compiled once per instruction set.
#pragma once
#include "ops/cpu/attention_blocks.h"

namespace capstan::ops::cpu {
namespace {

// Scores of one row -> exp(s - top); returns the log-sum-exp and 1 / sum.
template <class S>
struct RowSoftmax {
  S lse, inverse;
};
template <class S>
CAPSTAN_INLINE RowSoftmax<S> softmax_row(S* row, int64_t columns, Run run, int64_t first_key) {
  using V = VecOf<S>;
  if (run.begin == run.end) {
    for (int64_t c = 0; c < columns; c += kLanes<S>) store(row + c, V{});
    return {-static_cast<S>(__builtin_inf()), 0};
  }
  mask_row(row, columns, run, first_key);
  V top_v = splat(-static_cast<S>(__builtin_inf()));
  for (int64_t c = 0; c < columns; c += kLanes<S>) {
    const V x = load(row + c);
    top_v = x > top_v ? x : top_v;
  }
  const S top = max_lanes(top_v);
  V sum_v{};
  for (int64_t c = 0; c < columns; c += kLanes<S>) {
    const V e = exp_of(load(row + c) - top);
    sum_v += e;
    store(row + c, e);
  }
  const S sum = sum_lanes(sum_v);
  return {top + static_cast<S>(__builtin_log(sum)), S(1) / sum};
}

template <class T>
void forward_block(const AttentionArgs& a, const AttentionPlan<ScalarOf<T>>& plan,
                   const ForwardScratch<ScalarOf<T>>& s, const QueryBlock& b) {
  using S = ScalarOf<T>;
  constexpr int kP = kPanel<S>;
  const int64_t panels = b.panel_end - b.panel_begin, first_key = b.panel_begin * kP;
  const int64_t columns = panels * kP, width = a.head_size;
  pack_rows(rows_of_block<T>(a, a.q, b), static_cast<S>(a.scale), s.queries);
  multiply<S>({.rows = b.rows,
               .panels = panels,
               .depth = width,
               .a = s.queries,
               .a_row = width,
               .a_k = 1,
               .b = s.keys + first_key * width,
               .b_panel = width * kP,
               .c = s.scores,
               .c_row = plan.score_row,
               .add = false});
  S* const lse = lse_of_block<S>(a, b);
  S inverse[kQueryBlock];
  for (int64_t r = 0; r < b.rows; ++r) {
    const auto result = softmax_row(s.scores + r * plan.score_row, columns, b.runs[r], first_key);
    lse[r] = result.lse;
    inverse[r] = result.inverse;
  }
  multiply<S>({.rows = b.rows,
               .panels = plan.head_panels,
               .depth = columns,
               .a = s.scores,
               .a_row = plan.score_row,
               .a_k = 1,
               .b = s.values + first_key * kP,
               .b_panel = plan.keys_padded * kP,
               .c = s.out,
               .c_row = plan.head_padded,
               .add = false});
  store_rows<T>(a.out, b, {s.out, plan.head_padded, b.rows, width}, inverse);
}

template <class T>
void attention_forward(const AttentionArgs& a, int64_t task_begin, int64_t task_end,
                       void* scratch) {
  using S = ScalarOf<T>;
  const AttentionPlan<S> plan(a);
  Arena<S> arena{static_cast<S*>(scratch)};
  const ForwardScratch<S> s(a, plan, arena);
  const int64_t group = a.query_heads / a.key_heads;
  const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
  QueryBlock b;
  for (int64_t i = task_begin; i < task_end; ++i) {
    const Task task(a, i);
    pack_transposed(keys_of_task<T>(a, a.k, task), s.keys);
    pack_columns(keys_of_task<T>(a, a.v, task), plan.keys_padded, s.values);
    for (int64_t block = task.split; block < blocks; block += a.splits) {
      describe_block<kPanel<S>>(a, task.sample, block, b);
      for (int64_t g = 0; g < group; ++g) {
        b.head = task.key_head * group + g;
        forward_block<T>(a, plan, s, b);
      }
    }
  }
}

}  // namespace
}  // namespace capstan::ops::cpu
