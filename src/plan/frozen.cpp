// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/frozen.h"

#include <algorithm>
#include <utility>

#include "plan/resolve_internal.h"

namespace capstan::plan {

std::vector<ParamSpec> freeze(std::vector<ParamSpec> table,
                              const std::vector<std::string>& patterns) {
  const std::vector<bool> chosen = select_params(table, patterns);
  for (size_t i = 0; i < table.size(); ++i)
    if (chosen[i]) table[i].trainable = false;
  return table;
}

std::vector<ParamSpec> freeze_blocks(std::vector<ParamSpec> table, std::span<const int> blocks) {
  for (ParamSpec& spec : table)
    if (std::find(blocks.begin(), blocks.end(), spec.block) != blocks.end()) spec.trainable = false;
  return table;
}

int64_t count_trainable(const std::vector<ParamSpec>& table) {
  int64_t count = 0;
  for (const ParamSpec& spec : table) count += spec.trainable ? numel(spec.shape) : 0;
  return count;
}

std::vector<TornUnit> frozen_apart(const std::vector<ParamSpec>& table) {
  return torn_units(table, [](const ParamSpec& spec) { return !spec.trainable; });
}

void check_frozen(Draft& draft, const ModelShape& shape) {
  const std::vector<std::string>& patterns = draft.recipe.model.frozen;
  if (patterns.empty()) return;
  const std::vector<ParamSpec> all = find_family(shape.family).param_table(shape);
  check_patterns(draft, "model.frozen", patterns, all);
  const std::vector<ParamSpec> table = freeze(all, patterns);
  const bool trains =
      std::any_of(table.begin(), table.end(), [](const ParamSpec& spec) { return spec.trainable; });
  if (!trains)
    draft.refuse({"model.frozen", "every parameter", "at least one that is trained",
                  "nothing would change from step to step",
                  "Add what is to be trained with ! in front, as in '!model.norm.weight'"});
  refuse_torn(draft, {"model.frozen", "frozen", "both frozen or both trained"},
              frozen_apart(table));
}

}  // namespace capstan::plan
