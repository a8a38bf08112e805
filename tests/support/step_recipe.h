// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A committed step whose recipe says something else, as if its run had been another one.
#pragma once
#include <fstream>
#include <stdexcept>
#include <string>

#include "capstan/base/file.h"
#include "capstan/base/hash.h"
#include "capstan/checkpoint/manifest.h"

namespace capstan::test {

// Replaces the first `from` of the step's recipe.yaml. Throws where there is none.
inline void change_step_recipe(const Path& step, const std::string& from, const std::string& to) {
  const Path recipe = step / "recipe.yaml", manifest_file = step / "manifest.json";
  std::string text = read_file(recipe);
  const size_t at = text.find(from);
  if (at == std::string::npos) throw std::runtime_error("no '" + from + "' in " + recipe.string());
  text.replace(at, from.size(), to);
  checkpoint::Manifest manifest =
      checkpoint::parse_manifest(read_file(manifest_file), manifest_file.string());
  for (checkpoint::StoredFile& file : manifest.files)
    if (file.name == "recipe.yaml")
      file = {file.name, static_cast<int64_t>(text.size()), xxh3_128_hex(text)};
  std::ofstream(recipe) << text;
  std::ofstream(manifest_file) << checkpoint::to_text(manifest);
}

}  // namespace capstan::test
