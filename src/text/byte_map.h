// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The byte alphabet of byte-level BPE: 188 printable bytes stand for themselves, the other 68 are
// written as U+0100 and up, in order.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace capstan::text {

[[nodiscard]] const std::array<uint32_t, 256>& byte_characters();  // code point of each byte
// "Ġthe" for " the".
[[nodiscard]] std::string bytes_to_symbols(std::string_view bytes);
// The reverse; nullopt when a character stands for no byte.
[[nodiscard]] std::optional<std::string> symbols_to_bytes(std::string_view symbols);

}  // namespace capstan::text
