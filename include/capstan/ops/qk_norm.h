// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// RMSNorm of each head of q and k, then RoPE, in one pass. Legend: B samples, T tokens, X features
// of all heads, H head size.
//   y = x r weight, r = 1 / sqrt(mean(x^2) + eps) over a head; out = y turned as in rope.h
#pragma once
#include "capstan/ops/rope.h"

namespace capstan::ops {

// One weight for all query heads, one for all key heads, of the compute type or the master's.
struct QkNorm {
  Param q_weight_H, k_weight_H;
  double eps = 1e-6;
  explicit operator bool() const { return static_cast<bool>(q_weight_H); }
};

// x [B, T, X] holds spec.heads heads, the first `query_heads` of them queries; what is behind them
// (v) is copied. Positions as in rope.h. Saves x: it must not be written to afterwards. Without a
// backward it works in place.
[[nodiscard]] Tensor qk_norm_rope(const Tensor& x_BTX, const Tensor& positions_BT,
                                  const QkNorm& norm, int64_t query_heads, const RopeSpec& spec);

}  // namespace capstan::ops
