// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Text helpers shared by error messages: nearest name, UTF-8 validity, quoting of untrusted text.
#pragma once
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

// The candidate with the smallest edit distance, if it is close enough to be a likely slip of the
// pen.
[[nodiscard]] std::optional<std::string> nearest_name(std::string_view word,
                                                      std::span<const std::string> candidates);
// Offset of the first byte that is not well-formed UTF-8 (RFC 3629), or nullopt.
[[nodiscard]] std::optional<size_t> find_invalid_utf8(std::string_view text);
// `text` in single quotes with control bytes escaped, cut after `limit` bytes.
[[nodiscard]] std::string quote(std::string_view text, size_t limit = 80);
[[nodiscard]] std::string join(std::span<const std::string> parts, std::string_view separator);
// Shell-style pattern over '/'-separated relative paths: * and ? stay within a part, ** crosses
// parts. A pattern without '/' is matched against the last part and, as a folder name, against
// every part.
[[nodiscard]] bool glob_match(std::string_view pattern, std::string_view path);

}  // namespace capstan
