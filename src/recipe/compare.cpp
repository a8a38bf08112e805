// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "capstan/base/hash.h"
#include "capstan/recipe/load.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

// As text; a place past the end of a list is "(none)".
std::string value_text(const Key& key, const Recipe& recipe, size_t index) {
  if (index >= instances(key, recipe)) return "(none)";
  return format_value(key, get_value(key, recipe, index));
}

}  // namespace

std::vector<Difference> compare_recipes(const Recipe& before, const Recipe& after) {
  std::vector<Difference> differences;
  for (const Key& key : keys()) {
    const size_t count = std::max(instances(key, before), instances(key, after));
    for (size_t i = 0; i < count; ++i) {
      std::string old_text = value_text(key, before, i), new_text = value_text(key, after, i);
      if (old_text == new_text) continue;
      differences.push_back(
          {path_of(key, i), std::move(old_text), std::move(new_text), key.is_free});
    }
  }
  return differences;
}

// Values at their default are left out, so that a key added by a later version with a neutral
// default keeps the identity of older runs.
std::string identity_hash(const Recipe& recipe) {
  std::vector<std::string> lines;
  for (const Key& key : keys()) {
    if (key.is_free) continue;
    for (size_t i = 0; i < instances(key, recipe); ++i) {
      const Value value = get_value(key, recipe, i);
      if (!key.is_required && value == default_value(key)) continue;
      lines.push_back(path_of(key, i) + "=" + format_value(key, value) + "\n");
    }
  }
  std::sort(lines.begin(), lines.end());
  Hasher hasher;
  for (const std::string& line : lines) hasher.update(line);
  return hasher.hex();
}

}  // namespace capstan::recipe
