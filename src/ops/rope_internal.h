// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What rope and qk_norm_rope share. Legend: B samples, T tokens, X features, N heads, H head size.
#pragma once
#include "capstan/ops/rope.h"

namespace capstan::ops {

// Positions as the kernels read them, and a table that is long enough.
struct RopeInput {
  Tensor positions_BT;  // int64, contiguous; undefined: every row is 0 .. T-1
  RopeTable table;
};
[[nodiscard]] RopeInput check_rope(const Tensor& x_BTX, const Tensor& positions_BT,
                                   const RopeSpec& spec);

// Heads in the table's dtype, turned, or back.
[[nodiscard]] Tensor turned_heads(const Tensor& heads_BTNH, const RopeInput& rope, bool backward);

}  // namespace capstan::ops
