// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/param_patterns.h"

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
  bool chooses;
};
Pattern parse(std::string_view text) {
  const bool takes_out = text.starts_with('!');
  return {takes_out ? text.substr(1) : text, !takes_out};
}

// What parameters share that are chosen together, or -1: experts of one layer count as one.
constexpr int kExperts = -2;
int unit_of(const ParamSpec& spec) { return spec.expert >= 0 ? kExperts : spec.fuse_group; }

// "model.layers.0.", or as the family names its first layer.
std::string first_layer(const std::vector<ParamSpec>& table) {
  for (const ParamSpec& spec : table)
    if (const size_t at = spec.name.find(".0."); at != std::string::npos)
      return spec.name.substr(0, at + 3);
  return table.front().name;
}

}  // namespace

bool matches_any(const std::vector<ParamSpec>& table, std::string_view pattern) {
  return std::any_of(table.begin(), table.end(), [&](const ParamSpec& spec) {
    return glob_match(parse(pattern).glob, spec.name);
  });
}

std::vector<bool> select_params(const std::vector<ParamSpec>& table,
                                const std::vector<std::string>& patterns) {
  std::vector<bool> chosen(table.size(), false);
  for (size_t i = 0; i < table.size(); ++i)
    for (const std::string& text : patterns)
      if (const Pattern pattern = parse(text); glob_match(pattern.glob, table[i].name))
        chosen[i] = pattern.chooses;
  return chosen;
}

std::vector<TornUnit> torn_units(const std::vector<ParamSpec>& table,
                                 const std::function<bool(const ParamSpec&)>& is_chosen) {
  std::map<std::pair<int, int>, std::pair<const ParamSpec*, const ParamSpec*>> seen;
  for (const ParamSpec& spec : table) {
    if (unit_of(spec) == -1) continue;
    auto& [chosen, other] = seen[{spec.block, unit_of(spec)}];
    (is_chosen(spec) ? chosen : other) = &spec;
  }
  std::vector<TornUnit> torn;
  for (const auto& [unit, specs] : seen)
    if (specs.first && specs.second)
      torn.push_back({specs.first->name, specs.second->name,
                      unit.second == kExperts ? "the experts of a layer are treated alike"
                                              : "one product reads both"});
  return torn;
}

void check_patterns(Draft& draft, const char* key, const std::vector<std::string>& patterns,
                    const std::vector<ParamSpec>& table) {
  for (const std::string& pattern : patterns) {
    if (matches_any(table, pattern)) continue;
    const bool tied_head =
        draft.recipe.model.tie_word_embeddings && pattern.find("lm_head") != std::string::npos;
    draft.refuse(
        {key, quote(pattern), "a pattern that matches a parameter",
         tied_head ? "a tied head is " + table.front().name
                   : fmt::format("the {} names run from {} to {}", table.size(), table.front().name,
                                 table.back().name),
         fmt::format("* stands for any run of characters, as in '{}*'", first_layer(table))});
  }
}

void refuse_torn(Draft& draft, const TearRefusal& refusal, const std::vector<TornUnit>& torn) {
  if (torn.empty()) return;
  const TornUnit& first = torn.front();
  draft.refuse(
      {refusal.key,
       fmt::format("{} {} without {}{}", first.chosen, refusal.state, first.other,
                   torn.size() > 1 ? fmt::format(", and {} like it", torn.size() - 1) : ""),
       refusal.need, first.why, "Widen the pattern"});
}

}  // namespace capstan::plan
