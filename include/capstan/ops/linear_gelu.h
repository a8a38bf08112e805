// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A projection, GELU, and the projection behind it, as products that do what lies between them in
// their own pass where cuBLASLt can: out = gelu(x W^T + b) with the sum beside it, and the gradient
// of the sum in one product of the second weight. Where it cannot (GELU by erf, fp32 and fp64, fp8,
// a width that is no multiple of 8, CPUs) the same is done by the ops of linear.h and gelu.h.
// Legend: D input features, F features between, O output features, N tokens.
#pragma once
#include "capstan/ops/gelu.h"
#include "capstan/ops/linear.h"

namespace capstan::ops {

// Alike in shape and dtype. What reads `out` is recorded as a function of `sum`, which is the one
// with a history; backwards read both.
struct Activated {
  Tensor sum, out;  // [..., F]; out = gelu(sum)
  GeluForm form = GeluForm::kTanh;
};

// x [..., D] in compute dtype -> sum = x W^T + b, and its GELU.
[[nodiscard]] Activated linear_gelu(const Tensor& x, const Projection& projection, GeluForm form,
                                    LinearMode mode = {});
// out as a tensor with a history of its own, for readers that know nothing of the sum.
[[nodiscard]] Tensor activation_of(const Activated& x);
// y = out W^T + b; its backward gives the gradient of the sum.
[[nodiscard]] Tensor linear(const Activated& x, const Projection& projection, bool with_bias = true,
                            LinearMode mode = {});

// Pieces for layers that place a collective between them. No autograd.
[[nodiscard]] Activated linear_gelu_forward(const Tensor& x, const Projection& projection,
                                            GeluForm form, LinearMode mode);
[[nodiscard]] Activated activated(const Tensor& sum, GeluForm form);
// Gradient of the sum that x was made from: (grad W) gelu'(sum).
[[nodiscard]] Tensor linear_gelu_gradient(const Tensor& grad, const Projection& projection,
                                          const Tensor& sum, GeluForm form, LinearMode mode);

}  // namespace capstan::ops
