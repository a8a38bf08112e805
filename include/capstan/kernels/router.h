// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Choice of experts: scores, top-k with bias and groups, weights, and the gradient of the logits.
// Legend: N tokens, E experts (at most 512), k choices (at most 32), S rows, A fp32 or fp64.
// Matches src/ops/router.cpp, except that scores of NaN are chosen last.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

struct RouterShape {
  DType dtype = DType::kFp32;  // A
  int64_t tokens = 0, experts = 0, per_token = 1;
  bool sigmoid = false;                      // scores: sigmoid, else softmax, of the logits
  bool normalize = true;                     // weights of a token sum to 1 before scaling
  int64_t groups = 1, groups_per_token = 1;  // at most 32 groups
  double scaling = 1;
};

// chosen: by falling score + bias, of equal ones the lower number; among the groups whose best two
// sum highest. weights = scaling x score [/ sum of the chosen scores]. Bytes per logit: A read and
// written.
struct RouterForwardArgs {
  RouterShape shape;
  const void* logits = nullptr;  // A [N, E]
  const void* bias = nullptr;    // A [E], or null
  void* scores = nullptr;        // A [N, E]
  int64_t* chosen = nullptr;     // [N, k]
  void* weights = nullptr;       // A [N, k]
};
void router_forward(const RouterForwardArgs& args, Stream stream);

// Gradient of the weights, of sum balance[row, e] share and of z sum logsumexp(logits)^2 by the
// logits; share is the score scaled to sum 1. Bytes per logit: A read (+ A of balance), A written.
struct RouterBackwardArgs {
  RouterShape shape;
  const void* logits = nullptr;
  const int64_t* chosen = nullptr;
  const void* grad_weights = nullptr;  // A [N, k]
  const void* balance = nullptr;       // A [S, E], or null
  const int64_t* row = nullptr;        // [N]; with balance
  double z = 0;
  void* grad_logits = nullptr;  // A [N, E]
};
void router_backward(const RouterBackwardArgs& args, Stream stream);

}  // namespace capstan::kernels
