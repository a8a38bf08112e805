// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Decoders whose MLP is a mixture of experts; everything else is llama.
#pragma once
#include "capstan/plan/family.h"

namespace capstan::plan {

// Hugging Face Mixtral: softmax router, no shared expert.
[[nodiscard]] FamilyDef mixtral_family();
// Every option of ExpertShape; names of Hugging Face Qwen2-MoE.
[[nodiscard]] FamilyDef moe_family();
[[nodiscard]] ActivationBytes moe_activation_bytes(const ModelShape& shape,
                                                   const ActivationQuery& query);

}  // namespace capstan::plan
