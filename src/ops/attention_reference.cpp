// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Attention as plain math. Legend: B samples, T queries, S keys, N query heads, K key/value heads,
// H head size.
#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "ops/attention_internal.h"

namespace capstan::ops::attention_forms {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::ScalarType wide_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Heads before tokens, in the wide dtype, key heads repeated for their query heads.
Tensor heads_first(const Tensor& x_BTNH, int64_t repeat = 1) {
  const Tensor x_BNTH = x_BTNH.transpose(1, 2).to(wide_dtype(x_BTNH));
  return repeat == 1 ? x_BNTH : x_BNTH.repeat_interleave(repeat, 1);
}

Tensor fold_groups(const Tensor& x_BNSH, int64_t repeat) {
  const auto s = x_BNSH.sizes();
  return x_BNSH.reshape({s[0], s[1] / repeat, repeat, s[2], s[3]}).sum(2).transpose(1, 2);
}

// True where a query may see a key: [B or 1, 1, T, S].
Tensor allowed(const Call& call) {
  const int64_t queries = call.q_BTNH.size(1), keys = call.k_BSKH.size(1);
  const auto index = call.q_BTNH.options().dtype(at::kLong);
  const Tensor last_T1 = (at::arange(queries, index) + call.mask.query_offset).unsqueeze(1);
  const Tensor key_S = at::arange(keys, index).unsqueeze(0);
  Tensor allow = (key_S <= last_T1).view({1, 1, queries, keys});
  if (call.mask.sliding_window)
    allow = allow.logical_and(key_S > last_T1 - *call.mask.sliding_window);
  if (call.mask.first_key_BT.defined()) {
    const Tensor first = call.mask.first_key_BT.to(at::kLong).view({-1, 1, queries, 1});
    allow = allow.logical_and(key_S >= first);
  }
  return allow;
}

Tensor scores(const Call& call, int64_t repeat) {
  const Tensor s =
      at::matmul(heads_first(call.q_BTNH), heads_first(call.k_BSKH, repeat).transpose(2, 3)) *
      call.scale;
  return s.masked_fill(allowed(call).logical_not(), -kInfinity);
}

Tensor finite_or_zero(const Tensor& x) { return at::where(x == -kInfinity, at::zeros_like(x), x); }

}  // namespace

AttentionParts reference_forward(const Call& call) {
  const int64_t repeat = call.q_BTNH.size(2) / call.k_BSKH.size(2);
  const Tensor s = scores(call, repeat);
  const Tensor top = finite_or_zero(s.amax(-1, true));
  const Tensor p = (s - top).exp(), sum = p.sum(-1, true);
  const Tensor lse = (sum.log() + top).squeeze(-1);
  const Tensor safe = at::where(sum == 0, at::ones_like(sum), sum);
  const Tensor out = at::matmul(p, heads_first(call.v_BSKH, repeat)) / safe;
  return {out.transpose(1, 2).contiguous().to(call.q_BTNH.scalar_type()), lse.contiguous()};
}

AttentionGrads reference_backward(const Call& call, const Tensor& grad,
                                  const AttentionParts& parts) {
  const int64_t repeat = call.q_BTNH.size(2) / call.k_BSKH.size(2);
  const Tensor k = heads_first(call.k_BSKH, repeat), v = heads_first(call.v_BSKH, repeat);
  const Tensor g = heads_first(grad), q = heads_first(call.q_BTNH);
  const Tensor p = (scores(call, repeat) - finite_or_zero(parts.lse_BNT).unsqueeze(-1)).exp();
  const Tensor delta = (g * heads_first(parts.out_BTNH)).sum(-1, true);
  const Tensor ds = p * (at::matmul(g, v.transpose(2, 3)) - delta) * call.scale;
  return {at::matmul(ds, k).transpose(1, 2), fold_groups(at::matmul(ds.transpose(2, 3), q), repeat),
          fold_groups(at::matmul(p.transpose(2, 3), g), repeat)};
}

}  // namespace capstan::ops::attention_forms
