// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Residual addition and RMSNorm in one pass: residual += hidden; normed = residual / rms(residual)
// * weight. Legend: D hidden features.
#pragma once
#include "capstan/ops/record.h"

namespace capstan::ops {

struct AddRmsNorm {
  Tensor residual;  // the new residual stream, residual dtype; shares memory with the old one when
                    // there was no hidden
  Tensor normed;    // hidden's dtype (compute)
};

// Whether ops that save the normed output keep it, or have it made again from the residual stream,
// which is kept either way.
enum class NormOutput { kKept, kRemade };

// residual [..., D]; hidden [..., D] in compute dtype, or undefined: nothing to add. Sums of
// squares and the scale are fp32 (fp64 for fp64). The inputs stay as they are.
[[nodiscard]] AddRmsNorm add_rms_norm(const Tensor& residual, const Tensor& hidden,
                                      const Param& weight_D, double eps,
                                      NormOutput output = NormOutput::kKept);

}  // namespace capstan::ops
