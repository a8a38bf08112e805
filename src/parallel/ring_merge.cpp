// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>

#include <limits>

#include "parallel/ring_attention_internal.h"

namespace capstan::parallel {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// exp(lse - total), 0 where the part saw nothing (-inf minus -inf would be NaN), as [B, t, N, 1].
Tensor weight_of(const Tensor& lse_BNt, const Tensor& total_BNt) {
  const Tensor weight = (lse_BNt - total_BNt).exp().masked_fill(lse_BNt == -kInfinity, 0.0);
  return weight.transpose(1, 2).unsqueeze(-1);
}

}  // namespace

MergedAttention nothing_seen(const Tensor& q) {
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = q.options().dtype(wide).requires_grad(false);
  return {at::zeros(q.sizes(), options),
          at::full({q.size(0), q.size(2), q.size(1)}, -kInfinity, options)};
}

void merge_(const MergedAttention& whole, const ops::AttentionParts& part, int64_t begin) {
  const int64_t queries = part.out_BTNH.size(1);
  const Tensor out = whole.out_BtNH.narrow(1, begin, queries);
  const Tensor lse = whole.lse_BNt.narrow(2, begin, queries);
  const Tensor total = at::logaddexp(lse, part.lse_BNT);
  out.mul_(weight_of(lse, total));
  out.addcmul_(part.out_BTNH.to(out.scalar_type()), weight_of(part.lse_BNT, total));
  lse.copy_(total);
}

}  // namespace capstan::parallel
