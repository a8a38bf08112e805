// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The matmul rate of this machine: the denominator of MFU on CPUs.
#pragma once
#include "capstan/base/dtype.h"

namespace capstan::device {

// Best rate of a few square matrix products in 1e9 FLOP/s with the given number of threads; takes
// under half a second. dtype: fp64, fp32, bf16 or fp16. Call it from a thread that has nothing else
// to do.
[[nodiscard]] double measure_matmul_peak(DType dtype, int threads);

}  // namespace capstan::device
