// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Residual addition and LayerNorm in one pass: residual += hidden; normed = (residual - mean) *
// rstd * weight + bias. Legend: D hidden features.
#pragma once
#include "capstan/ops/norm.h"

namespace capstan::ops {

struct AddLayerNorm {
  Tensor residual;  // the new residual stream, residual dtype; shares memory with the old one when
                    // there was no hidden
  Tensor normed;    // hidden's dtype (compute)
};

// residual [..., D]; hidden [..., D] in compute dtype, or undefined: nothing to add. Mean, variance
// (of the D numbers themselves, about their mean) and scale are fp32 (fp64 for fp64). The inputs
// stay as they are. InternalError for shapes or dtypes that do not fit.
[[nodiscard]] AddLayerNorm add_layer_norm(const Tensor& residual, const Tensor& hidden,
                                          const Param& weight_D, const Param& bias_D, double eps,
                                          NormOutput output = NormOutput::kKept);

}  // namespace capstan::ops
