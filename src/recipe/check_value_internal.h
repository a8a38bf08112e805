// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Range, spelling and availability of one value whose type is right.
#pragma once
#include <optional>
#include <string>

#include "recipe/schema_internal.h"

namespace capstan::recipe {

// A problem without place and key; `need` empty means that `got` is a whole statement.
struct Complaint {
  std::string got, need, why, fix;
};
[[nodiscard]] std::optional<Complaint> check_value(const Key& key, const Value& value);

}  // namespace capstan::recipe
