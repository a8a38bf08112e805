// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Attention in bf16 with products of pairs. What is multiplied is bf16: q, k, v and gradients as
// they come, probabilities and their gradients rounded; sums, softmax and log-sum-exp are fp32.
// Gradients of keys and values are summed transposed, [head][key]: their products then read
// probabilities as they are made.
#pragma once
#include "ops/cpu/attention_body.h"
#include "ops/cpu/attention_pairs_backward.h"
#include "ops/cpu/attention_pairs_forward.h"

namespace capstan::ops::cpu {
namespace {

inline AttentionSizes pair_attention_sizes(const AttentionArgs& a) {
  const PairPlan plan(a);
  PairArena forward{{nullptr}}, backward{{nullptr}};
  const PairForwardScratch counted_forward(plan, forward);
  const PairBackwardScratch counted_backward(plan, backward);
  return {forward.arena.used, backward.arena.used, plan.keys * plan.width};
}

constexpr AttentionKernels kPairAttentionKernels = {
    {attention_sizes<float>, pair_attention_sizes, attention_sizes<double>},
    {attention_forward<float>, pair_attention_forward, attention_forward<double>},
    {attention_backward<float>, pair_attention_backward, attention_backward<double>},
    {attention_sum_partials<float>, pair_attention_sum_partials, attention_sum_partials<double>}};

}  // namespace
}  // namespace capstan::ops::cpu
