// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the attention kernels share: sizes, scratch, blocks of queries and the keys that they see.
// T: storage type, S: its computing scalar. Keys of a block of queries are the panels [panel_begin,
// panel_end): all columns of the score scratch are counted from the first of them.
#pragma once
#include "ops/cpu/attention_kernels.h"
#include "ops/cpu/gemm_tile.h"

namespace capstan::ops::cpu {
namespace {

template <class S>
struct AttentionPlan {
  int64_t key_panels, keys_padded;   // over keys
  int64_t head_panels, head_padded;  // over the head's features
  int64_t score_row;  // row stride of scores: one vector more than keys, against cache conflicts

  explicit AttentionPlan(const AttentionArgs& a)
      : key_panels(panels_of<S>(a.keys)),
        keys_padded(key_panels * kPanel<S>),
        head_panels(panels_of<S>(a.head_size)),
        head_padded(head_panels * kPanel<S>),
        score_row(keys_padded + kLanes<S>) {}
};

// Hands out pieces of the thread's scratch, each aligned to a cache line's worth of scalars.
template <class S>
struct Arena {
  S* base;  // null: only counts
  int64_t used = 0;
  S* take(int64_t count) {
    S* const piece = base ? base + used : nullptr;
    used += (count + 15) / 16 * 16;
    return piece;
  }
};

template <class S>
struct ForwardScratch {
  S *keys, *values, *scores, *queries, *out;
  ForwardScratch(const AttentionArgs& a, const AttentionPlan<S>& p, Arena<S>& arena)
      : keys(arena.take(p.keys_padded * a.head_size)),
        values(arena.take(p.keys_padded * p.head_padded)),
        scores(arena.take(kQueryBlock * p.score_row)),
        queries(arena.take(kQueryBlock * a.head_size)),
        out(arena.take(kQueryBlock * p.head_padded)) {}
};

template <class S>
struct BackwardScratch {
  S *keys_t, *values_t, *keys, *p, *ds, *query_rows, *queries, *grad_rows, *grads, *dq, *dk, *dv;
  BackwardScratch(const AttentionArgs& a, const AttentionPlan<S>& p_, Arena<S>& arena)
      : keys_t(arena.take(p_.keys_padded * a.head_size)),
        values_t(arena.take(p_.keys_padded * a.head_size)),
        keys(arena.take(p_.keys_padded * p_.head_padded)),
        p(arena.take(kQueryBlock * p_.score_row)),
        ds(arena.take(kQueryBlock * p_.score_row)),
        query_rows(arena.take(kQueryBlock * a.head_size)),
        queries(arena.take(kQueryBlock * p_.head_padded)),
        grad_rows(arena.take(kQueryBlock * a.head_size)),
        grads(arena.take(kQueryBlock * p_.head_padded)),
        dq(arena.take(kQueryBlock * p_.head_padded)),
        dk(arena.take(p_.keys_padded * p_.head_padded)),
        dv(arena.take(p_.keys_padded * p_.head_padded)) {}
};

template <class S>
AttentionSizes attention_sizes(const AttentionArgs& a) {
  const AttentionPlan<S> plan(a);
  Arena<S> forward{nullptr}, backward{nullptr};
  ForwardScratch<S>(a, plan, forward);
  BackwardScratch<S>(a, plan, backward);
  return {forward.used, backward.used, plan.keys_padded * plan.head_padded};
}

struct Run {
  int64_t begin, end;  // keys that a query sees
};
CAPSTAN_INLINE Run keys_of(const AttentionArgs& a, int64_t sample, int64_t query) {
  const int64_t last = query + a.query_offset;
  int64_t begin = a.first_key ? a.first_key[sample * a.queries + query] : 0;
  if (a.window > 0 && last - a.window + 1 > begin) begin = last - a.window + 1;
  if (begin < 0) begin = 0;
  int64_t end = last + 1 < a.keys ? last + 1 : a.keys;
  if (end < begin) end = begin;
  return {begin, end};
}

// A block of at most kRows queries of one head and the panels of keys that it sees.
template <int64_t kRows>
struct BlockOf {
  int64_t sample, head;
  int64_t first, rows;
  int64_t panel_begin, panel_end;
  Run runs[kRows];
};
using QueryBlock = BlockOf<kQueryBlock>;
template <int64_t kPanelKeys, int64_t kRows>
CAPSTAN_INLINE void describe_block(const AttentionArgs& a, int64_t sample, int64_t block,
                                   BlockOf<kRows>& b) {
  b.sample = sample;
  b.first = block * kRows;
  b.rows = a.queries - b.first < kRows ? a.queries - b.first : kRows;
  int64_t low = a.keys, high = 0;
  for (int64_t r = 0; r < b.rows; ++r) {
    b.runs[r] = keys_of(a, sample, b.first + r);
    if (b.runs[r].begin == b.runs[r].end) continue;
    low = b.runs[r].begin < low ? b.runs[r].begin : low;
    high = b.runs[r].end > high ? b.runs[r].end : high;
  }
  b.panel_begin = low < high ? low / kPanelKeys : 0;
  b.panel_end = low < high ? (high + kPanelKeys - 1) / kPanelKeys : 0;
}

template <class T>
CAPSTAN_INLINE T* head_of(const HeadsView& view, int64_t sample, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + sample * view.sample + token * view.token + head * view.head;
}

// The row's scores outside its run become -inf, so that the loops below need no mask.
template <class S>
CAPSTAN_INLINE void mask_row(S* row, int64_t columns, Run run, int64_t first_key) {
  const S lowest = -static_cast<S>(__builtin_inf());
  for (int64_t c = 0; c < run.begin - first_key && c < columns; ++c) row[c] = lowest;
  for (int64_t c = run.end > first_key ? run.end - first_key : 0; c < columns; ++c) row[c] = lowest;
}

struct Task {
  int64_t sample, key_head, split;
  Task(const AttentionArgs& a, int64_t task)
      : sample(task / a.splits / a.key_heads),
        key_head(task / a.splits % a.key_heads),
        split(task % a.splits) {}
};

// Keys or values of the task, and the queries (or output gradients) of a block.
template <class T>
CAPSTAN_INLINE Rows<T> keys_of_task(const AttentionArgs& a, const HeadsView& view, const Task& t) {
  return {head_of<const T>(view, t.sample, 0, t.key_head), view.token, a.keys, a.head_size};
}
template <class T, int64_t kRows>
CAPSTAN_INLINE Rows<T> rows_of_block(const AttentionArgs& a, const HeadsView& view,
                                     const BlockOf<kRows>& b) {
  return {head_of<const T>(view, b.sample, b.first, b.head), view.token, b.rows, a.head_size};
}
template <class S, int64_t kRows>
CAPSTAN_INLINE S* lse_of_block(const AttentionArgs& a, const BlockOf<kRows>& b) {
  return static_cast<S*>(a.lse) + (b.sample * a.query_heads + b.head) * a.queries + b.first;
}

// Writes the block's rows, each times its scale if there are scales.
template <class T, int64_t kRows>
void store_rows(const HeadsView& view, const BlockOf<kRows>& b, const Rows<ScalarOf<T>>& from,
                const ScalarOf<T>* scales) {
  for (int64_t r = 0; r < from.count; ++r) {
    T* const to = head_of<T>(view, b.sample, b.first + r, b.head);
    const ScalarOf<T>* const row = from.data + r * from.stride;
    for (int64_t d = 0; d < from.width; d += kLanes<T>) {
      VecOf<T> x = load(row + d);
      if (scales) x *= scales[r];
      store_part(to + d, x, from.width - d);
    }
  }
}

}  // namespace
}  // namespace capstan::ops::cpu
