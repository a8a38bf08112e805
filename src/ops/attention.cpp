// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T queries, S keys, N query heads, K key/value heads, H head size, X all
// features.
#include "capstan/ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/path.h"
#include "ops/attention_internal.h"

namespace capstan::ops {
namespace attention_forms {
namespace {

AttentionParts libtorch_forward(const Call& call) {
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      call.q_BTNH.transpose(1, 2), call.k_BSKH.transpose(1, 2), call.v_BSKH.transpose(1, 2), 0.0,
      true, {}, call.scale);
  return {out.transpose(1, 2), lse};
}

AttentionGrads libtorch_backward(const Call& call, const Tensor& grad,
                                 const AttentionParts& parts) {
  auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad.transpose(1, 2), call.q_BTNH.transpose(1, 2), call.k_BSKH.transpose(1, 2),
      call.v_BSKH.transpose(1, 2), parts.out_BTNH.transpose(1, 2), parts.lse_BNT, 0.0, true, {},
      call.scale);
  return {q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)};
}

AttentionGrads gradients(Form form, const Call& call, const Tensor& grad,
                         const AttentionParts& parts) {
  switch (form) {
    case Form::kLibTorch:
      return libtorch_backward(call, grad, parts);
    case Form::kFlash:
      return flash_backward(call, grad, parts);
    case Form::kFlashDocuments:
      return flash_documents_backward(call, grad, parts);
    case Form::kEfficient:
      return efficient_backward(call, grad, parts);
    case Form::kEfficientDocuments:
      return efficient_documents_backward(call, grad, parts);
    default:
      return reference_backward(call, grad, parts);
  }
}

}  // namespace

AttentionCase case_of(const Tensor& q, const Tensor& k, const AttentionMask& mask) {
  return {.path = path(),
          .on_cpu = q.is_cpu(),
          .has_flash = has_flash(q.device()),
          .has_efficient = has_efficient(q.device()),
          .dtype = q.scalar_type(),
          .head_size = q.size(3),
          .queries = q.size(1),
          .keys = k.size(1),
          .query_offset = mask.query_offset,
          .sliding_window = mask.sliding_window,
          .documents = mask.first_key_BT.defined(),
          .has_starts = mask.documents.starts.defined()};
}

Form choose(const Tensor& q, const Tensor& k, const AttentionMask& mask) {
  return choose_attention(case_of(q, k, mask)).form;
}

AttentionParts forward(Form form, const Call& call) {
  switch (form) {
    case Form::kReference:
      return reference_forward(call);
    case Form::kLibTorch:
      return libtorch_forward(call);
    case Form::kKernel:
      return kernel_forward(call);
    case Form::kFlash:
      return flash_forward(call);
    case Form::kFlashDocuments:
      return flash_documents_forward(call);
    case Form::kEfficient:
      return efficient_forward(call);
    case Form::kEfficientDocuments:
      return efficient_documents_forward(call);
  }
  CAPSTAN_CHECK(false, "unknown form of attention");
}

void backward(Form form, const Call& call, const Tensor& grad, const AttentionParts& parts,
              const AttentionGrads& into) {
  if (form == Form::kKernel) return kernel_backward(call, grad, parts, into);
  const AttentionGrads g = gradients(form, call, grad, parts);
  into.q_BTNH.copy_(g.q_BTNH);
  into.k_BSKH.copy_(g.k_BSKH);
  into.v_BSKH.copy_(g.v_BSKH);
}

}  // namespace attention_forms

namespace {

using attention_forms::Call;
using attention_forms::Form;

void check_call(const Call& call) {
  const Tensor &q = call.q_BTNH, &k = call.k_BSKH, &v = call.v_BSKH;
  CAPSTAN_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes(),
                "attention: q, k, v must be [B, tokens, heads, H], k and v alike");
  CAPSTAN_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3),
                "attention: q and k differ in samples ({} and {}) or head size ({} and {})",
                q.size(0), k.size(0), q.size(3), k.size(3));
  CAPSTAN_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0,
                "attention: {} query heads over {} key heads", q.size(2), k.size(2));
  CAPSTAN_CHECK(!call.mask.sliding_window || *call.mask.sliding_window > 0,
                "attention: window of {} keys", *call.mask.sliding_window);
  const Tensor& first = call.mask.first_key_BT;
  CAPSTAN_CHECK(!first.defined() ||
                    (first.numel() == q.size(0) * q.size(1) && first.scalar_type() == at::kInt),
                "attention: first_key must be int32, one per query");
  const Tensor& starts = call.mask.documents.starts;
  CAPSTAN_CHECK(!starts.defined() || (first.defined() && starts.dim() == 1 && starts.numel() > 1 &&
                                      starts.scalar_type() == at::kInt && starts.is_contiguous()),
                "attention: starts of documents must be int32, beside first keys");
  const Tensor& of_queries = call.mask.query_starts;
  CAPSTAN_CHECK(
      !of_queries.defined() || (starts.defined() && of_queries.sizes() == starts.sizes() &&
                                of_queries.scalar_type() == at::kInt && of_queries.is_contiguous()),
      "attention: starts of documents among queries must be as those among keys");
}

// q, k, v (or their gradients) as views of the merged tensor.
AttentionGrads views_of(const Tensor& qkv, const AttentionHeads& h) {
  const auto part = [&](int64_t first_head, int64_t count) {
    return qkv.narrow(2, first_head * h.head_size, count * h.head_size)
        .view({qkv.size(0), qkv.size(1), count, h.head_size});
  };
  return {part(0, h.query_heads), part(h.query_heads, h.key_value_heads),
          part(h.query_heads + h.key_value_heads, h.key_value_heads)};
}

}  // namespace

AttentionParts attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                 const AttentionMask& mask) {
  at::NoGradGuard no_grad;
  const Call call{q, k, v, scale, mask};
  check_call(call);
  return attention_forms::forward(attention_forms::choose(q, k, mask), call);
}

void attention_backward(const Tensor& grad, const AttentionGrads& inputs,
                        const AttentionParts& parts, double scale, const AttentionMask& mask,
                        const AttentionGrads& into) {
  at::NoGradGuard no_grad;
  const Call call{inputs.q_BTNH, inputs.k_BSKH, inputs.v_BSKH, scale, mask};
  check_call(call);
  attention_forms::backward(attention_forms::choose(call.q_BTNH, call.k_BSKH, mask), call, grad,
                            parts, into);
}

Tensor attention(const Tensor& qkv, const AttentionHeads& h, const AttentionMask& mask) {
  CAPSTAN_CHECK(
      qkv.dim() == 3 && qkv.size(2) == (h.query_heads + 2 * h.key_value_heads) * h.head_size,
      "attention: {} features for {} + 2 x {} heads of {}", qkv.size(-1), h.query_heads,
      h.key_value_heads, h.head_size);
  const std::vector<int64_t> out_sizes{qkv.size(0), qkv.size(1), h.query_heads * h.head_size};
  AttentionParts parts;
  Tensor out;
  Form form;
  {
    at::NoGradGuard no_grad;
    const AttentionGrads in = views_of(qkv, h);
    const Call call{in.q_BTNH, in.k_BSKH, in.v_BSKH, h.scale, mask};
    check_call(call);
    form = attention_forms::choose(call.q_BTNH, call.k_BSKH, mask);
    parts = attention_forms::forward(form, call);
    out = parts.out_BTNH.reshape(out_sizes);
  }
  return record(out, {"attention",
                      {qkv},
                      {},
                      {qkv, out, parts.lse_BNT},
                      [h, mask, form](const Tensors& saved, Tensors& grads) -> Tensors {
                        at::NoGradGuard no_grad;
                        const Tensor d_qkv = at::empty(saved[0].sizes(), saved[0].options());
                        const AttentionGrads in = views_of(saved[0], h), into = views_of(d_qkv, h);
                        const auto heads = in.q_BTNH.sizes();
                        attention_forms::backward(
                            form, {in.q_BTNH, in.k_BSKH, in.v_BSKH, h.scale, mask},
                            grads[0].reshape(heads), {saved[1].view(heads), saved[2]}, into);
                        return {d_qkv};
                      }});
}

}  // namespace capstan::ops
