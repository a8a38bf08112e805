// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Scaled dot-product attention with grouped query heads. Every query sees one run of keys: causal,
// cut on the left by the start of its document and by a sliding window. Legend: B samples, T
// queries, S keys, N query heads, K key/value heads (N % K == 0), H head size, X all features.
#pragma once
#include <cstdint>
#include <optional>

#include "capstan/ops/record.h"
#include "capstan/param/context.h"

namespace capstan::ops {

// Query t sees the keys max(first_key, t + query_offset - window + 1) .. t + query_offset, within 0
// .. S - 1. A query without any key gives 0, and a log-sum-exp of -inf.
struct AttentionMask {
  int64_t query_offset = 0;               // key index of query 0: tokens cached before this pass
  std::optional<int64_t> sliding_window;  // keys seen, own position included
  Tensor first_key_BT;                    // int32, index of a key; undefined = 0
  // What first_key_BT says, for kernels of variable lengths; may be undefined. Of whole rows, or of
  // one chunk of each that has all keys, and query_starts of the one that has all queries, where
  // that is another.
  param::DocumentStarts documents;
  Tensor query_starts;
};

struct AttentionHeads {
  int64_t query_heads = 0, key_value_heads = 0, head_size = 0;
  double scale = 0;  // softmax(scale * q k^T)
};

// qkv [B, T, X] holds q, k, v side by side (N*H | K*H | K*H) -> [B, T, N*H]. Differentiable; saves
// qkv, not a copy.
[[nodiscard]] Tensor attention(const Tensor& qkv_BTX, const AttentionHeads& heads,
                               const AttentionMask& mask);

// Pieces, without autograd. Strided views with contiguous heads are read in place.
struct AttentionParts {
  Tensor out_BTNH, lse_BNT;  // natural log of the sum of exp(scores); fp32, fp64 for fp64
};
[[nodiscard]] AttentionParts attention_forward(const Tensor& q_BTNH, const Tensor& k_BSKH,
                                               const Tensor& v_BSKH, double scale,
                                               const AttentionMask& mask);
struct AttentionGrads {
  Tensor q_BTNH, k_BSKH, v_BSKH;
};
// Writes the gradients into the given tensors (views of one buffer, for instance).
void attention_backward(const Tensor& grad_BTNH, const AttentionGrads& inputs,
                        const AttentionParts& parts, double scale, const AttentionMask& mask,
                        const AttentionGrads& into);

}  // namespace capstan::ops
