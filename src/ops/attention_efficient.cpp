// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Attention of GPUs in fp32, as ATen has it under the name memory-efficient. Every query head has
// keys and values of its own, so shared ones are repeated and their gradients summed. The
// log-sum-exp comes in rows filled up with infinity: [B, N, R] of rows of tokens, [E, N, R] of
// documents. Legend beside ops/attention.h: G tokens of all samples, E documents, R places of a
// row, a multiple of 32.
#include <ATen/ATen.h>

#include <limits>

#include "capstan/base/check.h"
#include "ops/attention_internal.h"

namespace capstan::ops::attention_forms {
namespace {

constexpr int64_t kRowStep = 32;

int64_t padded(int64_t queries) { return (queries + kRowStep - 1) / kRowStep * kRowStep; }

EfficientMask mask_of(const Call& call) {
  const auto mask = efficient_mask(case_of(call.q_BTNH, call.k_BSKH, call.mask));
  CAPSTAN_CHECK(mask, "attention: a mask that the kernel for fp32 cannot express");
  return *mask;
}

std::optional<int64_t> window_of(const EfficientMask& mask) {
  return mask.window > 0 ? std::optional(mask.window) : std::nullopt;
}

Tensor for_every_head(const Tensor& x_BSKH, const Tensor& q) {
  const int64_t repeat = q.size(2) / x_BSKH.size(2);
  return repeat == 1 ? x_BSKH : x_BSKH.repeat_interleave(repeat, 2);
}

Tensor summed_heads(const Tensor& x_BSNH, const Tensor& like_BSKH) {
  const auto s = like_BSKH.sizes();
  const int64_t repeat = x_BSNH.size(2) / s[2];
  return repeat == 1 ? x_BSNH.view(s) : x_BSNH.view({s[0], s[1], s[2], repeat, s[3]}).sum(3);
}

// One row of all tokens.
Tensor all_tokens(const Tensor& x_BTNH) { return x_BTNH.flatten(0, 1).unsqueeze(0); }

// What the state of a generator would be; there is no dropout.
Tensor no_state(const Tensor& q) { return at::empty({}, q.options().dtype(at::kLong)); }

AttentionGrads gradients(const Call& call, const Tensor& grad, const Tensor& out, const Tensor& lse,
                         const std::optional<Tensor>& starts, int64_t longest,
                         const EfficientMask& mask) {
  const Tensor &q = call.q_BTNH, state = no_state(q);
  const auto view = [&](const Tensor& x) { return starts ? all_tokens(x) : x; };
  const auto [dq, dk, dv, unused] = at::_efficient_attention_backward(
      view(grad), view(q), view(for_every_head(call.k_BSKH, q)),
      view(for_every_head(call.v_BSKH, q)), {}, view(out), starts, starts,
      starts ? longest : q.size(1), starts ? longest : call.k_BSKH.size(1), lse, 0.0, state, state,
      static_cast<int64_t>(mask.diagonal), /*bias_requires_grad=*/false, call.scale, {},
      window_of(mask));
  return {dq.view(q.sizes()), summed_heads(dk, call.k_BSKH), summed_heads(dv, call.v_BSKH)};
}

// Where each token stands in its document: [G] of documents, [G] of places.
struct Places {
  Tensor document_G, place_G;
};
Places places_of(const Call& call) {
  const Tensor& starts = call.mask.documents.starts;
  const Tensor token_G =
      at::arange(call.q_BTNH.size(0) * call.q_BTNH.size(1), starts.options().dtype(at::kLong));
  // Documents of no tokens lie behind all others.
  const Tensor document_G =
      at::searchsorted(starts.to(at::kLong), token_G, false, /*right=*/true) - 1;
  return {document_G, token_G - starts.to(at::kLong).index({document_G})};
}

}  // namespace

AttentionParts efficient_forward(const Call& call) {
  const Tensor& q = call.q_BTNH;
  const EfficientMask mask = mask_of(call);
  const auto result = at::_efficient_attention_forward(
      q, for_every_head(call.k_BSKH, q), for_every_head(call.v_BSKH, q), {}, {}, {}, {}, {}, 0.0,
      static_cast<int64_t>(mask.diagonal), /*compute_log_sumexp=*/true, call.scale, {},
      window_of(mask));
  return {std::get<0>(result), std::get<1>(result).narrow(2, 0, q.size(1)).contiguous()};
}

AttentionGrads efficient_backward(const Call& call, const Tensor& grad,
                                  const AttentionParts& parts) {
  const int64_t queries = call.q_BTNH.size(1);
  const Tensor lse_BNR = at::constant_pad_nd(parts.lse_BNT, {0, padded(queries) - queries},
                                             std::numeric_limits<double>::infinity());
  return gradients(call, grad, parts.out_BTNH, lse_BNR, {}, 0, mask_of(call));
}

AttentionParts efficient_documents_forward(const Call& call) {
  const Tensor& q = call.q_BTNH;
  const EfficientMask mask = mask_of(call);
  const Tensor& starts = call.mask.documents.starts;
  const int64_t longest = call.mask.documents.longest;
  const auto result = at::_efficient_attention_forward(
      all_tokens(q), all_tokens(for_every_head(call.k_BSKH, q)),
      all_tokens(for_every_head(call.v_BSKH, q)), {}, starts, starts, longest, longest, 0.0,
      static_cast<int64_t>(mask.diagonal), /*compute_log_sumexp=*/true, call.scale, {},
      window_of(mask));
  const Places places = places_of(call);
  const Tensor lse_GN =
      std::get<1>(result).transpose(1, 2).index({places.document_G, places.place_G});
  return {std::get<0>(result).view(q.sizes()),
          lse_GN.view({q.size(0), q.size(1), q.size(2)}).transpose(1, 2)};
}

AttentionGrads efficient_documents_backward(const Call& call, const Tensor& grad,
                                            const AttentionParts& parts) {
  const Tensor& starts = call.mask.documents.starts;
  const int64_t longest = call.mask.documents.longest, heads = call.q_BTNH.size(2);
  const Tensor lse_ENR = at::full({starts.numel() - 1, heads, padded(longest)},
                                  std::numeric_limits<double>::infinity(), parts.lse_BNT.options());
  const Places places = places_of(call);
  lse_ENR.transpose(1, 2).index_put_({places.document_G, places.place_G},
                                     parts.lse_BNT.transpose(1, 2).flatten(0, 1));
  return gradients(call, grad, parts.out_BTNH, lse_ENR, starts, longest, mask_of(call));
}

}  // namespace capstan::ops::attention_forms
