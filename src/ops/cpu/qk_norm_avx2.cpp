// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/qk_norm_body.h"

namespace capstan::ops::cpu {
const QkNormKernels qk_norm_avx2 = kQkNormKernels;
}  // namespace capstan::ops::cpu
