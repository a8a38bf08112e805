// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Language-model head and cross entropy together, so that logits exist for a chunk of tokens at a
// time (plan::head_chunk_tokens) and are turned into their gradient in place. Rows of vocabulary
// padding take no part. Legend: B samples, T tokens, N = B T, D hidden features, V vocabulary rows.
#pragma once
#include <functional>

#include "capstan/ops/record.h"

namespace capstan::ops {

inline constexpr int64_t kIgnoreTarget = -100;

// The steps between ranks when the vocabulary is cut over them, and with it maybe the tokens of x
// (sequence parallel). Every rank makes the same calls in the same order. Default: one device.
struct VocabularyCut {
  std::function<void(const Tensor&)> max,
      sum;  // in place, over the ranks that share the vocabulary
  std::function<Tensor(const Tensor& x_BtD)> gather;  // this rank's tokens -> all tokens
  // Gradient of all tokens by this part of the vocabulary -> whole gradient of this rank's tokens.
  // May write into its argument.
  std::function<Tensor(const Tensor& dx_BTD)> reduce;
  int ranks = 1, rank = 0;  // of them; rank r holds the rows before those of rank r + 1
  [[nodiscard]] bool is_cut() const { return static_cast<bool>(sum); }
};

struct HeadScores {
  Tensor logprob_BT;  // log p(target), 0 at ignored targets; fp32, or fp64 when x is fp64
  Tensor entropy_BT;  // of the predicted distribution, 0 at ignored targets; undefined unless asked
                      // for
};
// Per-token scores with an ordinary backward, which makes the logits again. Targets are those of
// all tokens on every rank, and so are the results. Collective over: the ranks of `cut`.
[[nodiscard]] HeadScores head_scores(const Tensor& x_BTD, const Projection& head,
                                     const Tensor& targets_BT, bool entropy,
                                     const VocabularyCut& cut = {});

struct WeightedLoss {
  Tensor loss;        // 0-d: sum over targets of weight x -log p(target)
  Tensor logprob_BT;  // not differentiable
};
// The loss for known token weights. When a gradient is wanted it is made here, in the forward: the
// weight's is accumulated at once, that of x is kept. So the seed of the backward must be 1 and the
// backward runs at most once (both checked), and a forward without a backward leaves its weight
// gradient behind. Weights of ignored targets do not count. With `uniform` (fp64, in (0, 1))
// targets that are not ignored are replaced by labels drawn from the predicted distribution: the
// first whose probabilities, added up in the order of the vocabulary, exceed it.
[[nodiscard]] WeightedLoss head_weighted_loss(const Tensor& x_BTD, const Projection& head,
                                              const Tensor& targets_BT, const Tensor& weights_BT,
                                              const VocabularyCut& cut = {},
                                              const Tensor& uniform_BT = {});

// [..., V] of the local part of the vocabulary, without padding. No gradient.
[[nodiscard]] Tensor head_logits(const Tensor& x, const Projection& head);

// Pieces for a vocabulary that is cut over ranks. Logits [N, V] are the local columns, `first` the
// global number of column 0.
struct LogitStats {
  Tensor top_N;     // largest logit; -inf without columns
  Tensor sum_N;     // sum of exp(logit - top)
  Tensor picked_N;  // logit of the target, 0 when it is not among the columns
};
[[nodiscard]] LogitStats logit_stats(const Tensor& logits_NV, const Tensor& targets_N,
                                     int64_t first);
// In place: logits -> weight x (softmax - one_hot(target)), 0 for ignored targets.
void logits_to_gradient_(const Tensor& logits_NV, const Tensor& lse_N, const Tensor& targets_N,
                         const Tensor& weights_N, int64_t first);

}  // namespace capstan::ops
