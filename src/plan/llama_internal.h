// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU.
#pragma once
#include "capstan/plan/family.h"

namespace capstan::plan {

[[nodiscard]] FamilyDef llama_family();
[[nodiscard]] ActivationBytes llama_activation_bytes(const ModelShape& shape,
                                                     const ActivationQuery& query);

}  // namespace capstan::plan
