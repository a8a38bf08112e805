// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Choice of experts for tokens: logits, scores, top-k, weights, and the losses that keep the load
// even. Everything is fp32, or fp64 for fp64. docs/design/moe.md has the formulas. Legend: N
// tokens, D hidden features, E experts, k choices of a token, S rows (samples).
#pragma once
#include "capstan/ops/record.h"

namespace capstan::ops {

struct RouterSpec {
  int64_t per_token = 1;  // k
  bool sigmoid = false;   // scores: sigmoid, else softmax, of the logits
  bool normalize = true;  // weights of a token's experts are scaled to sum 1
  int64_t groups = 1, groups_per_token = 1;
  double scaling = 1;  // of the weights, last
};

struct Routing {
  Tensor logits_NE, scores_NE;
  Tensor experts_Nk;  // int64, by falling score (bias included); of equal ones the lower number
  Tensor weights_Nk;  // not differentiable
};

// No autograd. bias_E (may be undefined) is added to the scores for the choice alone. With groups,
// the choice is among the groups_per_token groups whose best two scores have the largest sums.
[[nodiscard]] Routing route(const Tensor& x_ND, const Tensor& weight_ED, const Tensor& bias_E,
                            const RouterSpec& spec);

// Losses on the router itself: sum over tokens and experts of balance[row, e] x share, share being
// the scores scaled to sum 1, plus z x sum over tokens of logsumexp(logits)^2.
struct RouterLoss {
  Tensor balance_SE;  // undefined: none
  Tensor row_N;       // int64, row of each token
  double z = 0;
};
// Local sums of the two losses, 0-d.
struct RouterLossValues {
  Tensor balance, z;
};
[[nodiscard]] RouterLossValues router_loss_values(const Routing& routing, const RouterSpec& spec,
                                                  const RouterLoss& loss);

// routing.weights_Nk, differentiable in x and the router's weight. Its backward adds the gradient
// of `loss` with seed 1, whatever the gradient of the weights is.
[[nodiscard]] Tensor router_weights(const Tensor& x_ND, const Projection& router,
                                    const Routing& routing, const RouterSpec& spec,
                                    const RouterLoss& loss = {});

// Smallest distance by which a choice (of groups, of experts) could have been another one; +inf
// without alternatives. For tests that compare decisions.
[[nodiscard]] double choice_margin(const Tensor& scores_NE, const Tensor& bias_E,
                                   const RouterSpec& spec);

// Tokens per row and expert, [S, E] int64, on the device of the experts.
[[nodiscard]] Tensor count_choices(const Tensor& experts_Nk, const Tensor& row_N, int64_t rows,
                                   int64_t experts);

// Which choices stay when an expert takes at most `capacity` tokens of a row, first come first
// served by the place in the row: bool [N, k]. The tokens are all of the rows, in any order; rows
// of -1 are padding. Rows that are not whole are an InternalError on the CPU; devices do not look.
struct CapacitySpec {
  int64_t rows = 0, row_length = 0, experts = 0, capacity = 0;
};
[[nodiscard]] Tensor keep_within_capacity(const Tensor& experts_Nk, const Tensor& row_N,
                                          const Tensor& place_N, const CapacitySpec& spec);

}  // namespace capstan::ops
