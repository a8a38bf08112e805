// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/nn/model.h"

namespace capstan::nn {

// GPT-2: learned positions, LayerNorm before attention and before the MLP, GELU, biases on every
// projection, tied or untied head.
[[nodiscard]] Model build_gpt2(const plan::ModelShape& shape, const ModelOptions& options,
                               const FindParam& find);

}  // namespace capstan::nn
