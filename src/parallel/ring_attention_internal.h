// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ring attention: queries stay, keys and values go round the context axis. Parts of the result are
// merged by their log-sum-exp; the backward makes probabilities from the whole one, and gradients
// of keys and values travel with them until they are home. Legend: B samples, t tokens of this
// rank, N query heads, K key/value heads, H head size, X = (N + 2K) H.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "capstan/comm/communicator.h"
#include "capstan/ops/attention.h"

namespace capstan::parallel {

using at::Tensor;

struct ContextAttention {
  comm::Communicator group;  // the context axis
  ops::AttentionHeads heads;
  std::optional<int64_t> sliding_window;
  Tensor first_key_Bt;              // int32, index into the whole row; undefined: joined
  param::DocumentStarts documents;  // of the whole rows, and of the chunks of the ring
  std::array<int64_t, 2> lowest_first_key = {0, 0};  // RowMap's
};

// qkv holds q, k, v side by side, turned; returns [B, t, N*H]. Every rank runs every hop, masked or
// not. Collective over: the context axis.
[[nodiscard]] Tensor ring_attention(const ContextAttention& call, const Tensor& qkv_BtX);

// Attention over parts of the keys, not yet cast: out [B, t, N, H] and lse [B, N, t] in the wide
// dtype.
struct MergedAttention {
  Tensor out_BtNH, lse_BNt;
};
[[nodiscard]] MergedAttention nothing_seen(const Tensor& q_BtNH);
// Adds the attention of more keys in place, for the queries begin .. begin + part's. Queries that
// saw nothing on either side keep 0 and -inf.
void merge_(const MergedAttention& whole, const ops::AttentionParts& part, int64_t begin);

}  // namespace capstan::parallel
