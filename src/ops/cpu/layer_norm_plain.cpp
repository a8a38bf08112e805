// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ops/cpu/layer_norm_body.h"

namespace capstan::ops::cpu {
const LayerNormKernels layer_norm_plain = kLayerNormKernels;
}  // namespace capstan::ops::cpu
