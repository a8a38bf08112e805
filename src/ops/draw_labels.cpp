// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Labels by inverting the cumulated probabilities. Legend: n tokens, V vocabulary rows held here, R
// ranks that share the vocabulary.
#include <ATen/ATen.h>

#include "ops/logits_internal.h"

namespace capstan::ops {
namespace {

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
  const Tensor sums_nV = (logits_nV.to(at::kDouble) - top_n.unsqueeze(1)).exp_().cumsum(1);
  const Tensor own_n = columns > 0 ? sums_nV.select(1, columns - 1) : at::zeros_like(top_n);
  const Tensor bounds_Rn = upper_bounds(own_n, cut);
  const Tensor wanted_n = uniform_n * bounds_Rn.select(0, cut.ranks - 1);
  const Tensor below_n = cut.rank > 0 ? bounds_Rn.select(0, cut.rank - 1) : at::zeros_like(own_n);
  Tensor is_here_n = wanted_n.ge(below_n);
  if (cut.rank + 1 < cut.ranks)
    is_here_n = is_here_n.logical_and(wanted_n.lt(bounds_Rn.select(0, cut.rank)));
  const Tensor place_n =
      sums_nV.le((wanted_n - below_n).unsqueeze(1)).sum(1).clamp_max(columns - 1);
  const Tensor label_n =
      at::where(is_here_n, (place_n + first_row).to(at::kDouble), at::zeros_like(own_n));
  if (cut.is_cut()) cut.sum(label_n);
  return at::where(targets_n.ne(kIgnoreTarget), label_n.to(at::kLong), targets_n);
}

}  // namespace capstan::ops
