// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Decoders whose MLP is a mixture of experts; everything else is llama.
#pragma once
#include <optional>
#include <string>

#include "capstan/plan/family.h"

namespace capstan::plan {

// Hugging Face Mixtral: softmax router, no shared expert.
[[nodiscard]] FamilyDef mixtral_family();
// Every option of ExpertShape; names of Hugging Face Qwen2-MoE.
[[nodiscard]] FamilyDef moe_family();
[[nodiscard]] ActivationBytes moe_activation_bytes(const ModelShape& shape,
                                                   const ActivationQuery& query);

// What keeps the experts of a recipe, of which nothing is `auto` any more, from one product for all
// of a layer on a GPU; ops::choose_grouped() sees what only the process knows.
struct GroupedObstacle {
  std::string why, fix;
};
[[nodiscard]] std::optional<GroupedObstacle> grouped_obstacle(const recipe::Recipe& recipe);

}  // namespace capstan::plan
