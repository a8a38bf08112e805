// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/byte_map.h"

#include "text/unicode.h"

namespace capstan::text {
namespace {

bool is_printable(uint32_t byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

constexpr uint32_t kHighest = 0x100 + 68;

const std::array<int16_t, kHighest>& character_bytes() {
  static const auto table = [] {
    std::array<int16_t, kHighest> bytes;
    bytes.fill(-1);
    for (int16_t b = 0; b < 256; ++b) bytes.at(byte_characters()[static_cast<size_t>(b)]) = b;
    return bytes;
  }();
  return table;
}

}  // namespace

const std::array<uint32_t, 256>& byte_characters() {
  static const auto table = [] {
    std::array<uint32_t, 256> characters{};
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; ++b) characters[b] = is_printable(b) ? b : next++;
    return characters;
  }();
  return table;
}

std::string bytes_to_symbols(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size() + bytes.size() / 4);
  for (const char c : bytes) append_utf8(out, byte_characters()[static_cast<uint8_t>(c)]);
  return out;
}

std::optional<std::string> symbols_to_bytes(std::string_view symbols) {
  std::string out;
  out.reserve(symbols.size());
  for (size_t at = 0; at < symbols.size();) {
    const size_t length = sequence_length(symbols.substr(at));
    if (length == 0) return std::nullopt;
    const uint32_t value = decode_at(symbols.data() + at).value;
    const int16_t byte = value < kHighest ? character_bytes()[value] : int16_t{-1};
    if (byte < 0) return std::nullopt;
    out.push_back(static_cast<char>(byte));
    at += length;
  }
  return out;
}

}  // namespace capstan::text
