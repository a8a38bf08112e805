// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU.
#pragma once
#include <string>

#include "capstan/plan/family.h"

namespace capstan::plan {

// Phases of the backward of a layer, for terms of its workspace.
enum LayerPhase { kDownWeight, kDownInput, kActivation, kGateUp, kAttention, kQkv };
// The largest sum of the terms of one phase, of either part.
[[nodiscard]] int64_t largest_phase(const std::vector<ActivationTerm>& terms,
                                    ActivationTerm::Part part, ActivationTerm::Part besides);

// Whether a weight gradient of another type than its buffer is made apart, then added: products of
// GPUs add to the wider buffer.
[[nodiscard]] inline bool makes_gradients_apart(const ActivationQuery& query) {
  return query.compute != query.gradients && !query.on_gpu;
}

[[nodiscard]] FamilyDef llama_family();
// How the layers of decoders built like llama's differ in what they keep.
struct DecoderForm {
  int64_t products = 2;         // of the MLP into its features: gate and up, or one
  int64_t norm_statistics = 1;  // numbers that a norm keeps of a token
  std::string column = "gate and up", activated = "gate x up";  // what terms call them
};
[[nodiscard]] ActivationBytes decoder_activation_bytes(const ModelShape& shape,
                                                       const ActivationQuery& query,
                                                       const DecoderForm& form);
[[nodiscard]] ActivationBytes llama_activation_bytes(const ModelShape& shape,
                                                     const ActivationQuery& query);

}  // namespace capstan::plan
