// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/attention_body.h"

namespace capstan::ops::cpu {
const AttentionKernels attention_plain = kAttentionKernels;
}  // namespace capstan::ops::cpu
