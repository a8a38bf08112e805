// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which part of attention a hop of the ring computes: pure arithmetic on rows, no tensors. Queries
// of one rank meet keys of another in up to 2 x 2 pairs of chunks (context_split.h), each of which
// is skipped, seen as a whole, or masked.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "capstan/parallel/context_split.h"

namespace capstan::parallel {

// Lowest and highest first key of the queries of a chunk, over all samples.
struct FirstKeys {
  int64_t lowest = 0, highest = 0;
};

struct RingMask {
  int ranks = 1;
  int64_t row_length = 0;
  std::optional<int64_t> sliding_window;
  std::array<FirstKeys, 2> first_keys;  // by chunk of this rank's queries; zeros: joined
};

// A rectangle of queries and keys, in local tokens of their ranks, for one call of attention.
struct RingBlock {
  int64_t query_begin = 0, queries = 0;
  int64_t key_begin = 0, keys = 0;
  int64_t key_row = 0;       // place of the first key in the whole row; first_key counts from it
  int64_t query_offset = 0;  // AttentionMask::query_offset
  bool windowed = false;     // the sliding window hides keys of this block
  bool documents = false;    // first_key hides keys of this block
  bool operator==(const RingBlock&) const = default;
};

// What the queries of `query_rank` compute with the keys of `key_rank`; pairs of which nothing is
// seen are left out, blocks that are seen as a whole are joined.
[[nodiscard]] std::vector<RingBlock> ring_blocks(const RingMask& mask, int query_rank,
                                                 int key_rank);

}  // namespace capstan::parallel
