// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "parallel/ring_blocks_internal.h"

namespace capstan::parallel {
namespace {

// One chunk of queries against one chunk of keys. Chunks are equal or apart.
std::optional<RingBlock> block_of(const RowRange& queries, const RowRange& keys,
                                  const FirstKeys& first, std::optional<int64_t> window) {
  if (keys.begin > queries.begin) return std::nullopt;  // all keys lie behind all queries
  if (first.lowest >= keys.end) return std::nullopt;    // documents begin later
  const bool diagonal = keys.begin == queries.begin;
  if (window && !diagonal && queries.begin - *window + 1 >= keys.end) return std::nullopt;
  RingBlock block{.query_begin = 0,
                  .queries = queries.size(),
                  .key_begin = 0,
                  .keys = keys.size(),
                  .key_row = keys.begin,
                  .query_offset = queries.begin - keys.begin};
  block.windowed = window && queries.end - *window > keys.begin;
  block.documents = first.highest > keys.begin;
  return block;
}

bool is_whole(const RingBlock& block) {
  return !block.windowed && !block.documents && block.query_offset >= block.keys - 1;
}

// Two whole blocks side by side become one.
void join_whole(std::vector<RingBlock>& blocks) {
  if (blocks.size() != 2 || !is_whole(blocks[0]) || !is_whole(blocks[1])) return;
  RingBlock joined = blocks[0];
  const RingBlock& other = blocks[1];
  if (joined.key_begin == other.key_begin)
    joined.queries += other.queries;
  else if (joined.query_begin == other.query_begin)
    joined.keys += other.keys;
  else
    return;
  joined.query_offset = joined.keys;  // every query sees every key
  blocks = {joined};
}

}  // namespace

std::vector<RingBlock> ring_blocks(const RingMask& mask, int query_rank, int key_rank) {
  const auto queries = context_ranges(mask.row_length, mask.ranks, query_rank);
  const auto keys = context_ranges(mask.row_length, mask.ranks, key_rank);
  std::vector<RingBlock> blocks;
  for (size_t q = 0, query_begin = 0; q < queries.size(); query_begin += queries[q++].size())
    for (size_t k = 0, key_begin = 0; k < keys.size(); key_begin += keys[k++].size()) {
      auto block = block_of(queries[q], keys[k], mask.first_keys[q], mask.sliding_window);
      if (!block) continue;
      block->query_begin = static_cast<int64_t>(query_begin);
      block->key_begin = static_cast<int64_t>(key_begin);
      blocks.push_back(*block);
    }
  join_whole(blocks);
  return blocks;
}

}  // namespace capstan::parallel
