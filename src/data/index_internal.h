// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Layout of an .idx, shared by its reader and its writer:
//   magic[9] u64 version  u8 type  u64 sequences  u64 document indices
//   i32 length[sequences]  i64 pointer[sequences]  i64 document[document indices]
// Lengths count tokens, pointers are bytes into the .bin, documents are sequence numbers starting
// with 0 and ending with `sequences`; so there is one more of them than there are documents.
// Nothing is aligned.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace capstan::data::index_layout {

static_assert(std::endian::native == std::endian::little, "token files are little-endian");

inline constexpr std::array<char, 9> kMagic = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
inline constexpr uint64_t kVersion = 1;
inline constexpr size_t kVersionAt = kMagic.size();
inline constexpr size_t kTypeAt = kVersionAt + sizeof(uint64_t);
inline constexpr size_t kSequencesAt = kTypeAt + 1;
inline constexpr size_t kDocumentsAt = kSequencesAt + sizeof(uint64_t);
inline constexpr size_t kHeaderBytes = kDocumentsAt + sizeof(uint64_t);

template <class T>
[[nodiscard]] T load(std::span<const std::byte> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

}  // namespace capstan::data::index_layout
