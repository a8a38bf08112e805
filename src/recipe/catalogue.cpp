// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <system_error>

#include "capstan/base/env.h"
#include "capstan/base/text.h"
#include "capstan/recipe/load.h"

namespace capstan::recipe {
namespace {

namespace fs = std::filesystem;
constexpr const char* kExtension = ".yaml";

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

// share/capstan/configs beside the bin/ or libexec/capstan/ of the running program.
void add_install_folders(std::vector<fs::path>& folders) {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (error) return;
  const fs::path share = fs::path("share") / "capstan" / "configs";
  folders.push_back((program.parent_path() / ".." / share).lexically_normal());
  folders.push_back((program.parent_path() / ".." / ".." / share).lexically_normal());
}

// Earlier folders win. CAPSTAN_CONFIGS stands in for the source tree.
std::vector<fs::path> catalogue_folders() {
  std::vector<fs::path> folders = {"configs"};
  if (const auto chosen = read_env("CAPSTAN_CONFIGS"); chosen && !chosen->empty()) {
    folders.emplace_back(*chosen);
  } else {
    folders.push_back(fs::path(CAPSTAN_SOURCE_DIR) / "configs");
  }
  add_install_folders(folders);
  return folders;
}

bool is_catalogue_name(const std::string& name) {
  const fs::path path(name);
  return !name.empty() && !path.is_absolute() && path.extension() != kExtension &&
         std::none_of(path.begin(), path.end(), [](const fs::path& part) {
           return part == ".." || part == "." || part.empty();
         });
}

// First comment line of a file that is neither empty nor part of the licence.
std::string summary_of(const fs::path& path) {
  std::ifstream stream(path);
  std::string line;
  for (int count = 0; count < 20 && std::getline(stream, line) && line.starts_with('#'); ++count) {
    const size_t start = line.find_first_not_of("# ");
    if (start == std::string::npos || line.find("SPDX-") != std::string::npos) continue;
    return line.substr(start);
  }
  return "";
}

void list_folder(const fs::path& folder, std::map<std::string, CatalogueEntry>& found) {
  std::error_code error;
  constexpr auto kOptions = fs::directory_options::skip_permission_denied;
  fs::recursive_directory_iterator at(folder, kOptions, error), end;
  for (; !error && at != end; at.increment(error)) {
    if (at.depth() > 8) at.disable_recursion_pending();
    const fs::path& path = at->path();
    if (path.extension() != kExtension || !is_file(path)) continue;
    const std::string name = path.lexically_relative(folder).replace_extension().generic_string();
    if (!found.contains(name)) found[name] = {name, path, summary_of(path)};
  }
}

[[noreturn]] void throw_not_found(const std::string& name) {
  std::vector<std::string> names;
  for (const CatalogueEntry& entry : list_recipes()) names.push_back(entry.name);
  auto near = nearest_name(name, names);
  if (!near) near = nearest_name(fs::path(name).stem().string(), names);
  throw ConfigError(
      ErrorText{.module = "recipe",
                .what = "finding the recipe " + quote(name),
                .got = "no such file and no such name in the catalogue",
                .need = "a YAML file or a name from `capstan recipe list`",
                .why = names.empty() ? "the catalogue is empty" : "it has " + join(names, ", "),
                .fix = near ? fmt::format("Perhaps '{}' was meant", *near) : ""});
}

}  // namespace

fs::path find_recipe(const std::string& name_or_path) {
  if (is_file(name_or_path)) return name_or_path;
  if (is_catalogue_name(name_or_path)) {
    for (const fs::path& folder : catalogue_folders()) {
      const fs::path path = folder / (name_or_path + kExtension);
      if (is_file(path)) return path;
    }
  }
  throw_not_found(name_or_path);
}

std::vector<CatalogueEntry> list_recipes() {
  std::map<std::string, CatalogueEntry> found;
  for (const fs::path& folder : catalogue_folders()) list_folder(folder, found);
  std::vector<CatalogueEntry> entries;
  for (auto& [name, entry] : found) entries.push_back(std::move(entry));
  return entries;
}

}  // namespace capstan::recipe
