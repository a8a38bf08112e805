// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Parameters that a recipe names by patterns over their names: model.frozen, precision.keep_fp32.
#pragma once
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "capstan/plan/family.h"

namespace capstan::plan {

// Patterns in order: * is any run of characters, ? one; ! in front takes out again what it matches.
// A later pattern wins. A flag per parameter.
[[nodiscard]] std::vector<bool> select_params(const std::vector<ParamSpec>& table,
                                              const std::vector<std::string>& patterns);
[[nodiscard]] bool matches_any(const std::vector<ParamSpec>& table, std::string_view pattern);

// Parameters that are chosen together or not at all, when `is_chosen` separates some: those that
// one product reads (q, k, v; gate, up), and the experts of a layer. Names one of each kind.
struct TornUnit {
  std::string chosen, other, why;
};
[[nodiscard]] std::vector<TornUnit> torn_units(
    const std::vector<ParamSpec>& table, const std::function<bool(const ParamSpec&)>& is_chosen);

}  // namespace capstan::plan
