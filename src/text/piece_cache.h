// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Remembers the ids of short pieces: direct-mapped, 2 MiB, without allocation on use. One per
// thread and tokenizer; what it holds never changes results.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace capstan::text {

class PieceCache {
 public:
  static constexpr size_t kMaxPiece = 24, kMaxIds = 8;

  struct Key {
    std::array<uint64_t, 3> words{};
    uint32_t length = 0;  // 0 = too long for the cache
    explicit Key(std::string_view piece) {
      if (piece.empty() || piece.size() > kMaxPiece) return;
      std::memcpy(words.data(), piece.data(), piece.size());
      length = static_cast<uint32_t>(piece.size());
    }
    [[nodiscard]] size_t slot() const {
      uint64_t h = words[0] * 0x9e3779b97f4a7c15u;
      h = (h ^ h >> 29 ^ words[1]) * 0xbf58476d1ce4e5b9u;
      h = (h ^ h >> 32 ^ words[2] ^ length) * 0x94d049bb133111ebu;
      return static_cast<size_t>(h >> (64 - kBits));
    }
  };

  PieceCache() : slots_(size_t{1} << kBits) {}

  // Appends the ids and returns true when the piece is known.
  bool append(const Key& key, std::vector<int32_t>& out) const {
    const Slot& slot = slots_[key.slot()];
    if (slot.length != key.length || slot.words != key.words) return false;
    out.insert(out.end(), slot.ids.begin(), slot.ids.begin() + slot.count);
    return true;
  }
  void put(const Key& key, std::span<const int32_t> ids) {
    if (ids.size() > kMaxIds) return;
    Slot& slot = slots_[key.slot()];
    slot.words = key.words;
    slot.length = static_cast<uint16_t>(key.length);
    slot.count = static_cast<uint16_t>(ids.size());
    std::memcpy(slot.ids.data(), ids.data(), ids.size_bytes());
  }

 private:
  static constexpr int kBits = 15;
  struct alignas(64) Slot {
    std::array<uint64_t, 3> words{};
    std::array<int32_t, kMaxIds> ids{};
    uint16_t length = 0, count = 0;
  };
  static_assert(sizeof(Slot) == 64);
  std::vector<Slot> slots_;
};

}  // namespace capstan::text
