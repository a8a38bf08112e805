// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/rope_body.h"

namespace capstan::ops::cpu {
const RopeKernels rope_avx512bf16 = kRopeKernels;
}  // namespace capstan::ops::cpu
