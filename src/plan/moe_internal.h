// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Decoders whose MLP is a mixture of experts; everything else is llama.
#pragma once
#include <optional>
#include <string>

#include "capstan/plan/family.h"
#include "capstan/plan/plan.h"

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
// Rows of all experts for which the exchange of a rank with `tokens` of a micro-batch has room;
// 0 where rows travel in numbers that the host counts, or not at all.
[[nodiscard]] int64_t exchanged_rows(const recipe::Recipe& recipe, const ModelShape& shape,
                                     const BatchPlan& batch, int64_t tokens);
// The same for a rank that holds all experts too: rows of all experts, whoever gets how many.
[[nodiscard]] int64_t rows_with_room(const recipe::Recipe& recipe, const ModelShape& shape,
                                     const BatchPlan& batch, int64_t tokens);

}  // namespace capstan::plan
