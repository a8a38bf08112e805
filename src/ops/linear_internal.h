// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the forms of a linear layer share. Legend: O output features, N tokens.
#pragma once
#include <vector>

#include "capstan/ops/linear.h"

namespace capstan::ops {

[[nodiscard]] Tensor rows_of(const Tensor& x);

// A fresh [..., columns] tensor beside x, and its rows: results that are no views may be changed in
// place by the next op.
struct FreshRows {
  Tensor whole, rows_NO;
  FreshRows(const Tensor& x, int64_t columns);
};

[[nodiscard]] std::vector<Param> params_of(const Projection& projection, bool with_bias);
// The projection in fp8, or null.
[[nodiscard]] Fp8Linear* fp8_of(const Projection& projection, LinearMode mode);
// y with the node of a linear layer of x behind it.
[[nodiscard]] Tensor record_linear(const Tensor& y, const Tensor& x, const Projection& projection,
                                   bool with_bias, LinearMode mode);

}  // namespace capstan::ops
