// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Any bytes as a recipe: either they are one, and then its dump is the same recipe, or RecipeError
// says why not. The file name lies in a folder that does not exist, so that includes find nothing.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "capstan/recipe/load.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace capstan::recipe;
  try {
    const std::string text(reinterpret_cast<const char*>(data), size);
    const std::string dump = dump_recipe(parse_recipe(text, "no-such-folder/fuzz.yaml"), false);
    if (dump_recipe(parse_recipe(dump, "no-such-folder/dump.yaml"), false) != dump) std::abort();
  } catch (const RecipeError& error) {
    if (error.problems().empty()) std::abort();
  }
  return 0;
}
