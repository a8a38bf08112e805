// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Merging of one piece: the pair of lowest rank first, the leftmost among equals, until none is
// left.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace capstan::text {

inline constexpr int32_t kNoToken = -1;

// (left id, right id) -> (rank, merged id), open addressing.
class MergeTable {
 public:
  struct Entry {
    uint64_t key = ~uint64_t{0};
    int32_t rank = -1;
    int32_t merged = kNoToken;
  };
  explicit MergeTable(size_t merges = 0);
  void set(int32_t left, int32_t right, int32_t rank, int32_t merged);  // a later call wins
  [[nodiscard]] const Entry* find(int32_t left, int32_t right) const {
    const uint64_t key = key_of(left, right);
    for (size_t slot = hash(key) >> shift_;; slot = (slot + 1) & mask_) {
      const Entry& entry = entries_[slot];
      if (entry.key == key) return &entry;
      if (entry.rank < 0) return nullptr;
    }
  }

 private:
  static uint64_t key_of(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  static uint64_t hash(uint64_t key) {
    key ^= key >> 32;
    return key * 0x9e3779b97f4a7c15u;
  }
  std::vector<Entry> entries_;
  size_t mask_ = 0;
  int shift_ = 0;
};

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
template <class Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

struct BpeModel {
  std::array<int32_t, 256> byte_ids;  // kNoToken where the vocabulary lacks the byte
  MergeTable merges;
  StringMap<int32_t> whole_pieces;  // bytes -> id; filled only with ignore_merges
  bool ignore_merges = false;
  int32_t unknown_id = kNoToken;
  bool fuse_unknown = false;
};

// Appends the ids of one piece. Returns the first byte that has no token, or -1.
[[nodiscard]] int encode_piece(const BpeModel& model, std::string_view piece,
                               std::vector<int32_t>& out);

}  // namespace capstan::text
