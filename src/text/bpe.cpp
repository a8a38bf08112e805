// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <queue>
#include <span>

namespace capstan::text {
namespace {

constexpr size_t kSmallPiece = 48;  // quadratic search is faster than a heap up to here
constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();

struct Symbol {
  int32_t id;
  int32_t rank;    // of merging with the next symbol
  int32_t merged;  // what that gives
};

void look_up(const MergeTable& merges, Symbol& left, int32_t right) {
  const MergeTable::Entry* entry = merges.find(left.id, right);
  left.rank = entry ? entry->rank : kNoRank;
  left.merged = entry ? entry->merged : kNoToken;
}

void merge_small(const MergeTable& merges, std::span<const int32_t> ids,
                 std::vector<int32_t>& out) {
  std::array<Symbol, kSmallPiece> symbols;
  size_t count = ids.size();
  for (size_t i = 0; i < count; ++i) symbols[i] = {ids[i], kNoRank, kNoToken};
  for (size_t i = 0; i + 1 < count; ++i) look_up(merges, symbols[i], ids[i + 1]);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (symbols[i].rank < symbols[best].rank) best = i;
    }
    if (symbols[best].rank == kNoRank) break;
    symbols[best].id = symbols[best].merged;
    std::copy(symbols.begin() + best + 2, symbols.begin() + count, symbols.begin() + best + 1);
    --count;
    if (best > 0) look_up(merges, symbols[best - 1], symbols[best].id);
    if (best + 1 < count) {
      look_up(merges, symbols[best], symbols[best + 1].id);
    } else {
      symbols[best].rank = kNoRank;
    }
  }
  for (size_t i = 0; i < count; ++i) out.push_back(symbols[i].id);
}

struct Candidate {
  int32_t rank;
  uint32_t position;
  int32_t left, right, merged;
  bool operator>(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : position > other.position;
  }
};

// Linked list and heap; a candidate is stale when the symbols at its position have changed.
void merge_large(const MergeTable& merges, std::span<const int32_t> ids,
                 std::vector<int32_t>& out) {
  constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
  struct Node {
    int32_t id;
    uint32_t previous, next;
  };
  const auto count = static_cast<uint32_t>(ids.size());
  std::vector<Node> nodes(count);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto propose = [&](uint32_t at) {
    const uint32_t next = nodes[at].next;
    if (next == kNone) return;
    const MergeTable::Entry* entry = merges.find(nodes[at].id, nodes[next].id);
    if (entry) queue.push({entry->rank, at, nodes[at].id, nodes[next].id, entry->merged});
  };
  for (uint32_t i = 0; i < count; ++i) {
    nodes[i] = {ids[i], i > 0 ? i - 1 : kNone, i + 1 < count ? i + 1 : kNone};
  }
  for (uint32_t i = 0; i < count; ++i) propose(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Node& left = nodes[top.position];
    if (left.id != top.left || left.next == kNone || nodes[left.next].id != top.right) continue;
    Node& right = nodes[left.next];
    left.id = top.merged;
    left.next = right.next;
    right.id = kNoToken;  // dead
    if (left.next != kNone) nodes[left.next].previous = top.position;
    if (left.previous != kNone) propose(left.previous);
    propose(top.position);
  }
  for (uint32_t at = 0; at != kNone; at = nodes[at].next) out.push_back(nodes[at].id);
}

}  // namespace

MergeTable::MergeTable(size_t merges) {
  const size_t capacity = std::bit_ceil(std::max<size_t>(16, merges * 2 + 2));
  entries_.resize(capacity);
  mask_ = capacity - 1;
  shift_ = 64 - std::countr_zero(capacity);
}

void MergeTable::set(int32_t left, int32_t right, int32_t rank, int32_t merged) {
  const uint64_t key = key_of(left, right);
  for (size_t slot = hash(key) >> shift_;; slot = (slot + 1) & mask_) {
    if (entries_[slot].rank < 0 || entries_[slot].key == key) {
      entries_[slot] = {key, rank, merged};
      return;
    }
  }
}

int encode_piece(const BpeModel& model, std::string_view piece, std::vector<int32_t>& out) {
  if (model.ignore_merges) {
    const auto whole = model.whole_pieces.find(piece);
    if (whole != model.whole_pieces.end()) return out.push_back(whole->second), -1;
  }
  std::array<int32_t, kSmallPiece> few;
  std::vector<int32_t> many;
  if (piece.size() > kSmallPiece) many.resize(piece.size());
  int32_t* const ids = piece.size() > kSmallPiece ? many.data() : few.data();
  size_t count = 0;
  bool after_unknown = false;
  for (const char c : piece) {
    const auto byte = static_cast<uint8_t>(c);
    int32_t id = model.byte_ids[byte];
    const bool unknown = id == kNoToken;
    if (unknown && model.unknown_id == kNoToken) return byte;
    if (unknown) id = model.unknown_id;
    if (!(unknown && after_unknown && model.fuse_unknown)) ids[count++] = id;
    after_unknown = unknown;
  }
  const std::span<const int32_t> symbols(ids, count);
  if (count <= kSmallPiece) {
    merge_small(model.merges, symbols, out);
  } else {
    merge_large(model.merges, symbols, out);
  }
  return -1;
}

}  // namespace capstan::text
