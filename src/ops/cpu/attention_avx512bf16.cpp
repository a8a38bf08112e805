// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/attention_pairs.h"

namespace capstan::ops::cpu {
const AttentionKernels attention_avx512bf16 = kPairAttentionKernels;
}  // namespace capstan::ops::cpu
