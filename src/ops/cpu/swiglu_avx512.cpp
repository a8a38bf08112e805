// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/swiglu_body.h"

namespace capstan::ops::cpu {
const SwigluKernels swiglu_avx512 = kSwigluKernels;
}  // namespace capstan::ops::cpu
