// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/recipe/load.h"

#include "recipe/binder_internal.h"
#include "recipe/overrides_internal.h"
#include "recipe/reader_internal.h"
#include "recipe/rules_internal.h"

namespace capstan::recipe {
namespace {

void check_rules(Resolved& resolved, const Binder& binder, std::vector<Problem>& problems) {
  const auto origin_of = [&](const std::string& key) {
    const Origin origin = resolved.origin_of(key);
    return origin.line > 0 ? origin : binder.section_origin(key);
  };
  const auto is_good = [&](const std::string& key) { return binder.is_good(key); };
  RuleContext context(resolved, problems, origin_of, is_good);
  for (const Rule& rule : rules()) rule.check(context);
}

Resolved resolve(Node root, const FileReader& reader, std::span<const std::string> overrides,
                 Reading& reading) {
  Resolved resolved;
  resolved.files = reader.files();
  int number = 0;
  if (root.kind == Node::Kind::kMap) {
    for (const std::string& text : overrides) apply_override(root, text, ++number, reading);
    Binder binder(resolved, reading);
    binder.bind(root);
    if (!reading.lacks_a_file) check_rules(resolved, binder, reading.problems);
  }
  if (!reading.problems.empty()) throw RecipeError(std::move(reading.problems));
  return resolved;
}

}  // namespace

Resolved load_recipe(const std::filesystem::path& path, std::span<const std::string> overrides) {
  Reading reading;
  FileReader reader(reading);
  Node root = reader.read(path);
  return resolve(std::move(root), reader, overrides, reading);
}

Resolved parse_recipe(const std::string& text, const std::string& file_name,
                      std::span<const std::string> overrides) {
  Reading reading;
  FileReader reader(reading);
  Node root = reader.read_text(text, file_name);
  return resolve(std::move(root), reader, overrides, reading);
}

}  // namespace capstan::recipe
