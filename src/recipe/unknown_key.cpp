// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/unknown_key_internal.h"

#include <fmt/format.h>

#include "capstan/base/text.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

constexpr size_t kLongestName = 32;  // bounds the cost of the distance

std::string section_of(const std::string& path) {
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

}  // namespace

std::optional<std::string> probable_key(const std::string& path) {
  const std::string section = section_of(path), leaf = leaf_of(path);
  if (leaf.size() > kLongestName) return std::nullopt;
  if (const auto near = nearest_name(leaf, children(pattern_of(section)))) {
    return section.empty() ? *near : section + "." + *near;
  }
  for (const Key& key : keys()) {
    if (leaf_of(key.path) == leaf) return key.path;
  }
  return std::nullopt;
}

Problem unknown_key_problem(const std::string& path, const Origin& origin,
                            const std::optional<std::string>& probable) {
  const std::string section = section_of(path);
  const std::string why =
      section.empty() ? "a recipe has no such key" : fmt::format("'{}' has no such key", section);
  Problem problem{origin, path, "unknown key", "", why, ""};
  if (probable) problem.fix = fmt::format("Perhaps '{}' was meant", *probable);
  return problem;
}

}  // namespace capstan::recipe
