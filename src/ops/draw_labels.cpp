// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Labels by inverting the cumulated probabilities, which are fp64 and so are there for a few tokens
// at a time. Legend: n tokens, m of them at a time, V vocabulary rows held here, R ranks that share
// the vocabulary.
#include <ATen/ATen.h>

#include <algorithm>

#include "capstan/plan/family.h"
#include "ops/logits_internal.h"

namespace capstan::ops {
namespace {

// fn(sums_mV, first, m) for all tokens.
template <class Fn>
void for_sums(const Tensor& logits_nV, const Tensor& top_n, const Fn& fn) {
  const int64_t tokens = logits_nV.size(0);
  const int64_t step = plan::label_tokens(logits_nV.size(1), tokens);
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t m = std::min(step, tokens - first);
    const Tensor scores_mV =
        logits_nV.narrow(0, first, m).to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
    fn(scores_mV.sub_(top_n.narrow(0, first, m).unsqueeze(1)).exp_().cumsum(1), first, m);
  }
}

// What the ranks up to each one have of a sum; the same bits on all. [R, n]
Tensor upper_bounds(const Tensor& own_n, const VocabularyCut& cut) {
  const Tensor sums_Rn = at::zeros({cut.ranks, own_n.size(0)}, own_n.options());
  sums_Rn.select(0, cut.rank).copy_(own_n);
  if (cut.is_cut()) cut.sum(sums_Rn);
  return sums_Rn.cumsum(0);
}

}  // namespace

Tensor draw_labels(const Tensor& logits_nV, const Tensor& targets_n, const Tensor& uniform_n,
                   int64_t first_row, const VocabularyCut& cut) {
  const int64_t columns = logits_nV.size(1);
  const Tensor top_n = logit_stats(logits_nV, targets_n, first_row).top_N.to(at::kDouble);
  if (cut.is_cut()) cut.max(top_n);
  const Tensor own_n = at::zeros_like(top_n);
  if (columns > 0)
    for_sums(logits_nV, top_n, [&](const Tensor& sums_mV, int64_t first, int64_t m) {
      own_n.narrow(0, first, m).copy_(sums_mV.select(1, columns - 1));
    });
  const Tensor bounds_Rn = upper_bounds(own_n, cut);
  const Tensor wanted_n = uniform_n * bounds_Rn.select(0, cut.ranks - 1);
  const Tensor below_n = cut.rank > 0 ? bounds_Rn.select(0, cut.rank - 1) : at::zeros_like(own_n);
  Tensor is_here_n = wanted_n.ge(below_n);
  if (cut.rank + 1 < cut.ranks)
    is_here_n = is_here_n.logical_and(wanted_n.lt(bounds_Rn.select(0, cut.rank)));
  const Tensor own_part_n1 = (wanted_n - below_n).unsqueeze(1);
  const Tensor place_n = at::zeros_like(targets_n);
  for_sums(logits_nV, top_n, [&](const Tensor& sums_mV, int64_t first, int64_t m) {
    place_n.narrow(0, first, m)
        .copy_(sums_mV.le(own_part_n1.narrow(0, first, m)).sum(1).clamp_max(columns - 1));
  });
  const Tensor label_n =
      at::where(is_here_n, (place_n + first_row).to(at::kDouble), at::zeros_like(own_n));
  if (cut.is_cut()) cut.sum(label_n);
  return at::where(targets_n.ne(kIgnoreTarget), label_n.to(at::kLong), targets_n);
}

}  // namespace capstan::ops
