// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The values of choice keys that this build has. One table, read by validation, schema and docs.
// Modules of the torch half are known by name here too, since recipes are checked by the torch-free
// program.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace capstan::recipe {

struct ChoiceKey {
  std::string key;                     // "optimizer.name"
  std::vector<std::string> available;  // in this build
  std::vector<std::string> known;  // of later builds: `'muon' is not in this build (has: adamw)`
};
[[nodiscard]] const std::vector<ChoiceKey>& choice_keys();
[[nodiscard]] const ChoiceKey* find_choice_key(std::string_view key);
// One more value of a choice key (plan::register_family adds families of users). Before the first
// recipe is read: readers take no lock.
void add_choice(std::string_view key, const std::string& value);

}  // namespace capstan::recipe
