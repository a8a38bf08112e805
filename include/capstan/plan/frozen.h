// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which parameters are not trained (model.frozen). They keep their value: no gradient, no optimizer
// state, no part in the norm; checkpoints hold them like the others.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "capstan/plan/family.h"
#include "capstan/plan/param_patterns.h"

namespace capstan::plan {

[[nodiscard]] std::vector<ParamSpec> freeze(std::vector<ParamSpec> table,
                                            const std::vector<std::string>& patterns);
[[nodiscard]] std::vector<ParamSpec> freeze_blocks(std::vector<ParamSpec> table,
                                                   std::span<const int> blocks);
[[nodiscard]] int64_t count_trainable(const std::vector<ParamSpec>& table);  // elements
[[nodiscard]] std::vector<TornUnit> frozen_apart(const std::vector<ParamSpec>& table);

}  // namespace capstan::plan
