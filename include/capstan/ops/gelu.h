// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// GELU: x times the normal distribution function of x, or its approximation by tanh.
#pragma once
#include "capstan/ops/record.h"

namespace capstan::ops {

// kTanh: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), "gelu_pytorch_tanh" and "gelu_new" of
// Hugging Face. kErf: x/2 (1 + erf(x / sqrt(2))), "gelu".
enum class GeluForm { kTanh, kErf };

// x of any shape and float dtype -> the same shape and dtype. x stays as it is.
[[nodiscard]] Tensor gelu(const Tensor& x, GeluForm form);

// Without autograd: out = gelu(x), and out = grad gelu'(x), which may be grad. All alike.
void gelu_into(const Tensor& out, const Tensor& x, GeluForm form);
void gelu_gradient_into(const Tensor& out, const Tensor& x, const Tensor& grad, GeluForm form);

}  // namespace capstan::ops
