// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/norm_body.h"

namespace capstan::ops::cpu {
const NormKernels norm_avx512bf16 = kNormKernels;
}  // namespace capstan::ops::cpu
