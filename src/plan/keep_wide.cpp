// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/keep_wide.h"

#include <utility>

#include "plan/resolve_internal.h"

namespace capstan::plan {

std::vector<ParamSpec> keep_wide(std::vector<ParamSpec> table,
                                 const std::vector<std::string>& patterns) {
  const std::vector<bool> chosen = select_params(table, patterns);
  for (size_t i = 0; i < table.size(); ++i) table[i].wide = chosen[i];
  return table;
}

std::vector<TornUnit> wide_apart(const std::vector<ParamSpec>& table) {
  return torn_units(table, [](const ParamSpec& spec) { return spec.wide; });
}

void check_wide(Draft& draft, const ModelShape& shape) {
  const std::vector<std::string>& patterns = draft.recipe.precision.keep_fp32;
  if (patterns.empty()) return;
  const std::vector<ParamSpec> all = find_family(shape.family).param_table(shape);
  check_patterns(draft, "precision.keep_fp32", patterns, all);
  refuse_torn(draft, {"precision.keep_fp32", "kept", "both kept or neither"},
              wide_apart(keep_wide(all, patterns)));
}

}  // namespace capstan::plan
