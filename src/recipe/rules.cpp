// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/rules_internal.h"

#include <algorithm>

#include "recipe/schema_internal.h"

namespace capstan::recipe {

bool RuleContext::has(std::initializer_list<const char*> keys) const {
  return std::all_of(keys.begin(), keys.end(), [&](const char* key) { return is_good_(key); });
}

bool RuleContext::is_written(const std::string& key) const {
  const auto found = resolved_.origins.find(key);
  return found != resolved_.origins.end() && found->second.line > 0;
}

void RuleContext::add(const std::string& key, std::string got, std::string need, std::string why,
                      std::string fix) {
  problems_.push_back(
      {origin_of_(key), key, std::move(got), std::move(need), std::move(why), std::move(fix)});
}

void need_default(RuleContext& c, const char* path, const std::string& why,
                  const std::string& fix) {
  const Key& key = *find_key(path);
  if (!c.has({path})) return;
  const Value value = get_value(key, c.recipe());
  if (value == default_value(key)) return;
  c.add(path, format_value(key, value), format_value(key, default_value(key)), why, fix);
}

const std::vector<Rule>& rules() {
  static const std::vector<Rule> table = [] {
    std::vector<Rule> all = run_rules();
    for (const Rule& rule : model_rules()) all.push_back(rule);
    for (const Rule& rule : expert_rules()) all.push_back(rule);
    for (const Rule& rule : gpt2_rules()) all.push_back(rule);
    return all;
  }();
  return table;
}

}  // namespace capstan::recipe
