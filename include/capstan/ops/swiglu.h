// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// SwiGLU on the merged output of the gate and up projections.
// Legend: F features of gate and of up.
#pragma once
#include "capstan/ops/record.h"

namespace capstan::ops {

// gate_up [..., 2F], gate first -> silu(gate) * up, [..., F].
[[nodiscard]] Tensor swiglu(const Tensor& gate_up);

}  // namespace capstan::ops
