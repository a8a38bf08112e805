// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/cross_entropy_body.h"

namespace capstan::ops::cpu {
const CrossEntropyKernels cross_entropy_avx512 = kCrossEntropyKernels;
}  // namespace capstan::ops::cpu
