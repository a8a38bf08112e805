// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/frozen.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "capstan/base/text.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

struct Pattern {
  std::string_view glob;
  bool trains;
};
Pattern parse(std::string_view text) {
  const bool trains = text.starts_with('!');
  return {trains ? text.substr(1) : text, trains};
}

// What parameters share that are trained together, or -1: experts of one layer count as one.
constexpr int kExperts = -2;
int unit_of(const ParamSpec& spec) { return spec.expert >= 0 ? kExperts : spec.fuse_group; }

void check_patterns(Draft& draft, const std::vector<ParamSpec>& table) {
  const recipe::Model& model = draft.recipe.model;
  for (const std::string& pattern : model.frozen) {
    if (matches_any(table, pattern)) continue;
    const bool tied_head = model.tie_word_embeddings && pattern.find("lm_head") != pattern.npos;
    draft.refuse({"model.frozen", quote(pattern), "a pattern that matches a parameter",
                  tied_head ? "a tied head is model.embed_tokens.weight"
                            : fmt::format("the {} names run from {} to {}", table.size(),
                                          table.front().name, table.back().name),
                  "* stands for any run of characters, as in 'model.layers.0.*'"});
  }
}

}  // namespace

bool matches_any(const std::vector<ParamSpec>& table, std::string_view pattern) {
  return std::any_of(table.begin(), table.end(), [&](const ParamSpec& spec) {
    return glob_match(parse(pattern).glob, spec.name);
  });
}

std::vector<ParamSpec> freeze(std::vector<ParamSpec> table,
                              const std::vector<std::string>& patterns) {
  for (ParamSpec& spec : table)
    for (const std::string& text : patterns)
      if (const Pattern pattern = parse(text); glob_match(pattern.glob, spec.name))
        spec.trainable = pattern.trains;
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

std::vector<FrozenApart> frozen_apart(const std::vector<ParamSpec>& table) {
  std::map<std::pair<int, int>, std::pair<const ParamSpec*, const ParamSpec*>> seen;
  for (const ParamSpec& spec : table) {
    if (unit_of(spec) == -1) continue;
    auto& [frozen, trained] = seen[{spec.block, unit_of(spec)}];
    (spec.trainable ? trained : frozen) = &spec;
  }
  std::vector<FrozenApart> apart;
  for (const auto& [unit, specs] : seen)
    if (specs.first && specs.second)
      apart.push_back({specs.first->name, specs.second->name,
                       unit.second == kExperts ? "the experts of a layer are trained together"
                                               : "one product reads both"});
  return apart;
}

void check_frozen(Draft& draft, const ModelShape& shape) {
  const std::vector<std::string>& patterns = draft.recipe.model.frozen;
  if (patterns.empty()) return;
  const std::vector<ParamSpec> all = find_family(shape.family).param_table(shape);
  check_patterns(draft, all);
  const std::vector<ParamSpec> table = freeze(all, patterns);
  const bool trains =
      std::any_of(table.begin(), table.end(), [](const ParamSpec& spec) { return spec.trainable; });
  if (!trains)
    draft.refuse({"model.frozen", "every parameter", "at least one that is trained",
                  "nothing would change from step to step",
                  "Add what is to be trained with ! in front, as in '!model.norm.weight'"});
  const std::vector<FrozenApart> apart = frozen_apart(table);
  if (apart.empty()) return;
  const FrozenApart& first = apart.front();
  draft.refuse(
      {"model.frozen",
       fmt::format("{} frozen without {}{}", first.frozen, first.trained,
                   apart.size() > 1 ? fmt::format(", and {} like it", apart.size() - 1) : ""),
       "both frozen or both trained", first.why, "Widen the pattern"});
}

}  // namespace capstan::plan
