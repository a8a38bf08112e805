// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/fp8_body.h"

namespace capstan::ops::cpu {
const Fp8Kernels fp8_avx512bf16 = kFp8Kernels;
}  // namespace capstan::ops::cpu
