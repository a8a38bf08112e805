// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Loading, checking and printing recipes. Files are untrusted text: see load_recipe for what is
// refused.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/recipe/recipe.h"

namespace capstan::recipe {

// Where a value came from: `configs/a.yaml:12:5`, `--set:1:1`, `default`, `auto`.
struct Origin {
  std::string file;
  int line = 0, column = 0;  // 1-based; 0 for defaults
  [[nodiscard]] std::string text() const;
};

// One thing that is wrong: `FILE:LINE:COLUMN: error: KEY.PATH: got GOT, need NEED (WHY). FIX.`
// Empty parts are left out; without NEED, GOT is a whole statement ("'muon' is not in this build").
struct Problem {
  Origin origin;
  std::string key, got, need, why, fix;
  [[nodiscard]] std::string text() const;
};

// All problems at once, sorted by file and line, at most 50 printed; what() ends with
// `N problems; nothing was started`. Exit code 2.
class RecipeError : public ConfigError {
 public:
  explicit RecipeError(std::vector<Problem> problems);
  [[nodiscard]] const std::vector<Problem>& problems() const { return problems_; }
  const char* class_name() const override { return "RecipeError"; }

 private:
  std::vector<Problem> problems_;
};

struct Resolved {
  Recipe recipe;
  std::map<std::string, Origin>
      origins;  // by key path ("optimizer.lr", "data.train[0].path"); every key
  std::vector<std::filesystem::path> files;  // read, in order
  [[nodiscard]] Origin origin_of(const std::string& key) const;
};

// A recipe by path or by catalogue name (`quickstart`): ./configs, the source tree, the install's
// share.
[[nodiscard]] std::filesystem::path find_recipe(const std::string& name_or_path);
struct CatalogueEntry {
  std::string name;
  std::filesystem::path path;
  std::string summary;  // first comment line of the file after the licence
};
[[nodiscard]] std::vector<CatalogueEntry> list_recipes();

// Reads the file and its includes, applies overrides ("a.b=3"), fills defaults, validates every key
// on its own and the rules between keys that need no world size. Throws RecipeError with all
// problems.
[[nodiscard]] Resolved load_recipe(const std::filesystem::path& path,
                                   std::span<const std::string> overrides = {});
[[nodiscard]] Resolved parse_recipe(const std::string& text, const std::string& file_name,
                                    std::span<const std::string> overrides = {});

// The resolved recipe as YAML that parses to itself; with_origins adds `# FILE:LINE` behind every
// value.
[[nodiscard]] std::string dump_recipe(const Resolved& resolved, bool with_origins);
[[nodiscard]] std::string dump_recipe(const Recipe& recipe);
[[nodiscard]] std::string json_schema();         // JSON Schema 2020-12
[[nodiscard]] std::string markdown_reference();  // docs/recipes.md
// Hash of what decides the numbers of a run (identity of a resume): everything but the keys that
// docs/recipes.md marks free at a resume.
[[nodiscard]] std::string identity_hash(const Recipe& recipe);
struct Difference {
  std::string key, before, after;
  bool free_at_resume;
};
[[nodiscard]] std::vector<Difference> compare_recipes(const Recipe& before, const Recipe& after);

}  // namespace capstan::recipe
