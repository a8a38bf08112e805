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

}  // namespace capstan::ops
