// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// RMSNorm and LayerNorm in fp64, formulas of capstan/kernels/norm.h.
#pragma once
#include "kernels/array.h"

namespace capstan::kernels::test {

struct NormInput {
  size_t rows = 0, width = 0;
  bool centered = false;
  double eps = 1e-5;
  Values x, weight, bias;  // x: the sum, rounded; bias may be empty
};
struct NormOutput {
  Values normed, mean, rstd;
};
[[nodiscard]] NormOutput norm_forward(const NormInput& in);

struct NormGradients {
  Values dx, weight, bias;
};
// grad_residual may be empty.
[[nodiscard]] NormGradients norm_backward(const NormInput& in, const Values& grad,
                                          const Values& grad_residual);

}  // namespace capstan::kernels::test
