// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// FlashAttention-2 on GPUs, as ATen has it: heads stand behind tokens, grouped heads go straight
// in, the log-sum-exp comes back [B, N, T]. Causal masks end at the last key, which is what a query
// offset of S - T means; a window of W keys is W - 1 to the left.
#include <ATen/ATen.h>

#include "ops/attention_internal.h"

namespace capstan::ops::attention_forms {
namespace {

std::optional<int64_t> left_of(const AttentionMask& mask) {
  if (!mask.sliding_window) return std::nullopt;
  return *mask.sliding_window - 1;
}
std::optional<int64_t> right_of(const AttentionMask& mask) {
  return mask.sliding_window ? std::optional<int64_t>(0) : std::nullopt;
}

}  // namespace

bool flash_takes(const Tensor& q, const Tensor& k, const AttentionMask& mask) {
  const bool is_narrow = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  return is_narrow && q.size(3) % 8 == 0 && q.size(3) <= 256 && !mask.first_key_BT.defined() &&
         mask.query_offset == k.size(1) - q.size(1);
}

AttentionParts flash_forward(const Call& call) {
  const Tensor &q = call.q_BTNH, &k = call.k_BSKH;
  auto [out, lse, rng_state, unused, debug] = at::_flash_attention_forward(
      q, k, call.v_BSKH, {}, {}, q.size(1), k.size(1), 0.0, /*is_causal=*/true,
      /*return_debug_mask=*/false, call.scale, left_of(call.mask), right_of(call.mask));
  return {out, lse};
}

AttentionGrads flash_backward(const Call& call, const Tensor& grad, const AttentionParts& parts) {
  const Tensor &q = call.q_BTNH, &k = call.k_BSKH;
  const Tensor none;
  // Without dropout the state of the generator is not read.
  const Tensor state = at::empty({2}, q.options().dtype(at::kLong));
  auto [dq, dk, dv] = at::_flash_attention_backward(
      grad, q, k, call.v_BSKH, parts.out_BTNH, parts.lse_BNT, none, none, q.size(1), k.size(1), 0.0,
      /*is_causal=*/true, state, state, call.scale, left_of(call.mask), right_of(call.mask));
  return {dq, dk, dv};
}

}  // namespace capstan::ops::attention_forms
