// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/attention_body.h"

namespace capstan::ops::cpu {
const AttentionKernels attention_avx512bf16 = kAttentionKernels;
}  // namespace capstan::ops::cpu
