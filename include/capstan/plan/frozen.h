// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which parameters are not trained (model.frozen). They keep their value: no gradient, no optimizer
// state, no part in the norm; checkpoints hold them like the others.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "capstan/plan/family.h"

namespace capstan::plan {

// Patterns over names, in order: * is any run of characters, ? one; ! in front trains what it
// matches again. A later pattern wins.
[[nodiscard]] std::vector<ParamSpec> freeze(std::vector<ParamSpec> table,
                                            const std::vector<std::string>& patterns);
[[nodiscard]] std::vector<ParamSpec> freeze_blocks(std::vector<ParamSpec> table,
                                                   std::span<const int> blocks);
[[nodiscard]] int64_t count_trainable(const std::vector<ParamSpec>& table);  // elements
[[nodiscard]] bool matches_any(const std::vector<ParamSpec>& table, std::string_view pattern);

// Parameters that are trained together or not at all, when `table` separates some: those that one
// product reads (q, k, v; gate, up), and the experts of a layer. Names one of each kind.
struct FrozenApart {
  std::string frozen, trained, why;
};
[[nodiscard]] std::vector<FrozenApart> frozen_apart(const std::vector<ParamSpec>& table);

}  // namespace capstan::plan
