// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Backward of the attention kernels, compiled once per instruction set.
#pragma once
#include "ops/cpu/attention_blocks.h"

namespace capstan::ops::cpu {
namespace {

// p from scores by the log-sum-exp, ds from do v^T, both in place.
template <class T>
void probability_rows(const AttentionArgs& a, const AttentionPlan<ScalarOf<T>>& plan,
                      const BackwardScratch<ScalarOf<T>>& s, const QueryBlock& b) {
  using S = ScalarOf<T>;
  const int64_t first_key = b.panel_begin * kPanel<S>;
  const int64_t columns = (b.panel_end - b.panel_begin) * kPanel<S>;
  const S* const lse = lse_of_block<S>(a, b);
  const S scale = static_cast<S>(a.scale);
  for (int64_t r = 0; r < b.rows; ++r) {
    S* const p = s.p + r * plan.score_row;
    S* const ds = s.ds + r * plan.score_row;
    if (b.runs[r].begin == b.runs[r].end) {
      for (int64_t c = 0; c < columns; c += kLanes<S>) {
        store(p + c, VecOf<S>{});
        store(ds + c, VecOf<S>{});
      }
      continue;
    }
    const T* const out = head_of<const T>(a.out, b.sample, b.first + r, b.head);
    const S* const grad = s.grad_rows + r * a.head_size;
    VecOf<S> delta_v{};
    for (int64_t d = 0; d < a.head_size; d += kLanes<S>)
      delta_v += load_part(out + d, a.head_size - d) * load_part(grad + d, a.head_size - d);
    const S delta = sum_lanes(delta_v);
    mask_row(p, columns, b.runs[r], first_key);
    for (int64_t c = 0; c < columns; c += kLanes<S>) {
      const VecOf<S> x = exp_of(load(p + c) - lse[r]);
      store(ds + c, x * (load(ds + c) - delta) * scale);
      store(p + c, x);
    }
  }
}

template <class T>
void backward_block(const AttentionArgs& a, const AttentionPlan<ScalarOf<T>>& plan,
                    const BackwardScratch<ScalarOf<T>>& s, const QueryBlock& b) {
  using S = ScalarOf<T>;
  constexpr int kP = kPanel<S>;
  const int64_t panels = b.panel_end - b.panel_begin, first_key = b.panel_begin * kP;
  const int64_t columns = panels * kP, width = a.head_size;
  const Rows<T> q = rows_of_block<T>(a, a.q, b), grad = rows_of_block<T>(a, a.grad, b);
  pack_rows(q, static_cast<S>(a.scale), s.query_rows);
  pack_columns(q, b.rows, s.queries);
  pack_rows(grad, S(1), s.grad_rows);
  pack_columns(grad, b.rows, s.grads);
  Multiplication<S> scores{.rows = b.rows,
                           .panels = panels,
                           .depth = width,
                           .a = s.query_rows,
                           .a_row = width,
                           .a_k = 1,
                           .b = s.keys_t + first_key * width,
                           .b_panel = width * kP,
                           .c = s.p,
                           .c_row = plan.score_row,
                           .add = false};
  multiply<S>(scores);
  scores.a = s.grad_rows;
  scores.b = s.values_t + first_key * width;
  scores.c = s.ds;
  multiply<S>(scores);
  probability_rows<T>(a, plan, s, b);
  multiply<S>({.rows = b.rows,
               .panels = plan.head_panels,
               .depth = columns,
               .a = s.ds,
               .a_row = plan.score_row,
               .a_k = 1,
               .b = s.keys + first_key * kP,
               .b_panel = plan.keys_padded * kP,
               .c = s.dq,
               .c_row = plan.head_padded,
               .add = false});
  store_rows<T>(a.dq, b, {s.dq, plan.head_padded, b.rows, width}, nullptr);
  Multiplication<S> sums{.rows = columns,
                         .panels = plan.head_panels,
                         .depth = b.rows,
                         .a = s.p,
                         .a_row = 1,
                         .a_k = plan.score_row,
                         .b = s.grads,
                         .b_panel = b.rows * kP,
                         .c = s.dv + first_key * plan.head_padded,
                         .c_row = plan.head_padded,
                         .add = true};
  multiply<S>(sums);
  sums.a = s.ds;
  sums.b = s.queries;
  sums.c = s.dk + first_key * plan.head_padded;
  multiply<S>(sums);
}

template <class T>
void store_keys(const AttentionArgs& a, const HeadsView& view, const Task& task,
                const AttentionPlan<ScalarOf<T>>& plan, const ScalarOf<T>* from) {
  for (int64_t key = 0; key < a.keys; ++key) {
    T* const to = head_of<T>(view, task.sample, key, task.key_head);
    for (int64_t d = 0; d < a.head_size; d += kLanes<T>)
      store_part(to + d, load(from + key * plan.head_padded + d), a.head_size - d);
  }
}

template <class T>
void attention_backward(const AttentionArgs& a, int64_t task_begin, int64_t task_end,
                        void* scratch) {
  using S = ScalarOf<T>;
  const AttentionPlan<S> plan(a);
  Arena<S> arena{static_cast<S*>(scratch)};
  BackwardScratch<S> s(a, plan, arena);
  const int64_t group = a.query_heads / a.key_heads, sum = plan.keys_padded * plan.head_padded;
  const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
  QueryBlock b;
  for (int64_t i = task_begin; i < task_end; ++i) {
    const Task task(a, i);
    if (a.partial) {
      s.dk = static_cast<S*>(a.partial) + 2 * i * sum;
      s.dv = s.dk + sum;
    }
    pack_transposed(keys_of_task<T>(a, a.k, task), s.keys_t);
    pack_transposed(keys_of_task<T>(a, a.v, task), s.values_t);
    pack_columns(keys_of_task<T>(a, a.k, task), plan.keys_padded, s.keys);
    for (int64_t e = 0; e < sum; e += kLanes<S>) {
      store(s.dk + e, VecOf<S>{});
      store(s.dv + e, VecOf<S>{});
    }
    for (int64_t block = task.split; block < blocks; block += a.splits) {
      describe_block<kPanel<S>>(a, task.sample, block, b);
      for (int64_t g = 0; g < group; ++g) {
        b.head = task.key_head * group + g;
        backward_block<T>(a, plan, s, b);
      }
    }
    if (a.partial) continue;
    store_keys<T>(a, a.dk, task, plan, s.dk);
    store_keys<T>(a, a.dv, task, plan, s.dv);
  }
}

template <class T>
void attention_sum_partials(const AttentionArgs& a, int64_t pair_begin, int64_t pair_end, void*) {
  using S = ScalarOf<T>;
  const AttentionPlan<S> plan(a);
  const int64_t both = 2 * plan.keys_padded * plan.head_padded;
  for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
    S* const total = static_cast<S*>(a.partial) + pair * a.splits * both;
    for (int64_t split = 1; split < a.splits; ++split)
      for (int64_t e = 0; e < both; e += kLanes<S>)
        store(total + e, load(total + e) + load(total + split * both + e));
    const Task task(a, pair * a.splits);
    store_keys<T>(a, a.dk, task, plan, total);
    store_keys<T>(a, a.dv, task, plan, total + both / 2);
  }
}

}  // namespace
}  // namespace capstan::ops::cpu
