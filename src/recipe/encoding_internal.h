// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The bytes of a recipe, looked at before any YAML parser sees them.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace capstan::recipe {

struct EncodingFault {
  size_t offset;
  std::string got, why, fix;
};
// The first of: byte-order mark, NUL, other control character, invalid UTF-8, tab outside a
// comment.
[[nodiscard]] std::optional<EncodingFault> find_encoding_fault(std::string_view text);

struct Place {
  int line, column;  // 1-based; columns count bytes
};
[[nodiscard]] Place place_of(std::string_view text, size_t offset);

}  // namespace capstan::recipe
