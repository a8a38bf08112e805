// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What to say about a key that the schema does not have.
#pragma once
#include <optional>
#include <string>

#include "capstan/recipe/load.h"

namespace capstan::recipe {

// The key that was probably meant: a close name in the same section, else the same name elsewhere.
[[nodiscard]] std::optional<std::string> probable_key(const std::string& path);
[[nodiscard]] Problem unknown_key_problem(const std::string& path, const Origin& origin,
                                          const std::optional<std::string>& probable);

}  // namespace capstan::recipe
