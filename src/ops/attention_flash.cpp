// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// FlashAttention-2 on GPUs, as ATen has it: heads stand behind tokens, grouped heads go straight
// in, the log-sum-exp comes back in fp32: [B, N, T] of rows, [N, G] of documents. A mask is a band
// beside the diagonal that ends at the last key; causal is a band without end to the left. A
// document that has queries and no keys gets 0 and a log-sum-exp of infinity, one that has keys and
// no queries gradients of 0. Legend beside ops/attention.h: G tokens of all samples.
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "capstan/base/check.h"
#include "ops/attention_internal.h"

namespace capstan::ops::attention_forms {
namespace {

// What stands for no cu_seqlens and for the generator, whose state is not read without dropout.
struct Unused {
  Tensor lengths, state;
  explicit Unused(const Tensor& q) : state(at::empty({2}, q.options().dtype(at::kLong))) {}
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

FlashBand band_of(const Call& call) {
  const auto band = flash_band(case_of(call.q_BTNH, call.k_BSKH, call.mask));
  CAPSTAN_CHECK(band, "attention: a mask that FlashAttention cannot express");
  return *band;
}

// Only a causal call without a window may leave both ends open.
std::optional<int64_t> left_of(const FlashBand& band) {
  return band.left < 0 ? std::nullopt : std::optional(band.left);
}
std::optional<int64_t> right_of(const FlashBand& band) {
  return band.left < 0 && band.right == 0 ? std::nullopt : std::optional(band.right);
}

Tensor all_tokens_GNH(const Tensor& x_BTNH) { return x_BTNH.flatten(0, 1); }

struct Documents {
  FlashBand band;
  const Tensor &starts_q, &starts_k;
  bool in_parts;  // queries and keys of different chunks
};
Documents documents_of(const Call& call) {
  const auto band = flash_document_band(case_of(call.q_BTNH, call.k_BSKH, call.mask));
  CAPSTAN_CHECK(band, "attention: documents that FlashAttention cannot express");
  const AttentionMask& mask = call.mask;
  const bool in_parts = mask.query_starts.defined();
  return {*band, in_parts ? mask.query_starts : mask.documents.starts, mask.documents.starts,
          in_parts};
}

// A sequence of one query would be taken for decoding, and computed by another kernel.
int64_t longest_of(const Call& call) { return std::max<int64_t>(call.mask.documents.longest, 2); }

}  // namespace

AttentionParts flash_forward(const Call& call) {
  const Tensor &q = call.q_BTNH, &k = call.k_BSKH;
  const FlashBand band = band_of(call);
  auto [out, lse, rng_state, unused, debug] = at::_flash_attention_forward(
      q, k, call.v_BSKH, {}, {}, q.size(1), k.size(1), 0.0, /*is_causal=*/band.right == 0,
      /*return_debug_mask=*/false, call.scale, left_of(band), right_of(band));
  return {out, lse};
}

AttentionGrads flash_backward(const Call& call, const Tensor& grad, const AttentionParts& parts) {
  const Tensor &q = call.q_BTNH, &k = call.k_BSKH;
  const FlashBand band = band_of(call);
  const Unused none(q);
  auto [dq, dk, dv] = at::_flash_attention_backward(
      grad, q, k, call.v_BSKH, parts.out_BTNH, parts.lse_BNT.contiguous(), none.lengths,
      none.lengths, q.size(1), k.size(1), 0.0, /*is_causal=*/band.right == 0, none.state,
      none.state, call.scale, left_of(band), right_of(band));
  return {dq, dk, dv};
}

AttentionParts flash_documents_forward(const Call& call) {
  const Tensor& q = call.q_BTNH;
  const Documents docs = documents_of(call);
  const int64_t longest = longest_of(call);
  auto [out_GNH, lse_NG, rng_state, unused, debug] = at::_flash_attention_forward(
      all_tokens_GNH(q), all_tokens_GNH(call.k_BSKH), all_tokens_GNH(call.v_BSKH), docs.starts_q,
      docs.starts_k, longest, longest, 0.0, /*is_causal=*/docs.band.right == 0,
      /*return_debug_mask=*/false, call.scale, left_of(docs.band), right_of(docs.band));
  if (docs.in_parts) lse_NG.masked_fill_(lse_NG == kInfinity, -kInfinity);
  return {out_GNH.view(q.sizes()), lse_NG.view({q.size(2), q.size(0), q.size(1)}).transpose(0, 1)};
}

AttentionGrads flash_documents_backward(const Call& call, const Tensor& grad,
                                        const AttentionParts& parts) {
  const Tensor &q = call.q_BTNH, &k = call.k_BSKH;
  const Documents docs = documents_of(call);
  const int64_t longest = longest_of(call);
  const Tensor lse_NG = parts.lse_BNT.transpose(0, 1).flatten(1).contiguous();
  const Unused none(q);
  auto [dq, dk, dv] = at::_flash_attention_backward(
      all_tokens_GNH(grad), all_tokens_GNH(q), all_tokens_GNH(k), all_tokens_GNH(call.v_BSKH),
      all_tokens_GNH(parts.out_BTNH), lse_NG, docs.starts_q, docs.starts_k, longest, longest, 0.0,
      /*is_causal=*/docs.band.right == 0, none.state, none.state, call.scale, left_of(docs.band),
      right_of(docs.band));
  return {dq.view(q.sizes()), dk.view(k.sizes()), dv.view(k.sizes())};
}

}  // namespace capstan::ops::attention_forms
