// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/nn/model.h"

namespace capstan::nn {

// Llama: RMSNorm before attention and before the gated MLP, RoPE, grouped-query attention, SwiGLU,
// tied or untied head.
[[nodiscard]] Model build_llama(const plan::ModelShape& shape, const ModelOptions& options,
                                const FindParam& find);

}  // namespace capstan::nn
