// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU.
#pragma once
#include "capstan/plan/family.h"

namespace capstan::plan {

// Phases of the backward of a layer, for terms of its workspace.
enum LayerPhase { kDownWeight, kDownInput, kActivation, kGateUp, kAttention, kQkv };
// The largest sum of the terms of one phase, of either part.
[[nodiscard]] int64_t largest_phase(const std::vector<ActivationTerm>& terms,
                                    ActivationTerm::Part part, ActivationTerm::Part besides);

[[nodiscard]] FamilyDef llama_family();
[[nodiscard]] ActivationBytes llama_activation_bytes(const ModelShape& shape,
                                                     const ActivationQuery& query);

}  // namespace capstan::plan
