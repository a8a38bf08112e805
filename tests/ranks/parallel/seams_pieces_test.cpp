// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The pieces of context parallelism by themselves: zig-zag ranges, blocks of a hop, merging.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "capstan/base/error.h"
#include "capstan/parallel/context_split.h"
#include "parallel/ring_attention_internal.h"
#include "parallel/ring_blocks_internal.h"
#include "support/gradient_check.h"

namespace capstan::parallel {
namespace {

TEST(ContextSplit, RangesAreZigZagAndCoverTheRow) {
  EXPECT_EQ(context_ranges(10, 1, 0), (std::vector<RowRange>{{0, 10}}));
  EXPECT_EQ(context_ranges(24, 3, 0), (std::vector<RowRange>{{0, 4}, {20, 24}}));
  EXPECT_EQ(context_ranges(24, 3, 2), (std::vector<RowRange>{{8, 12}, {12, 16}}));
  for (const int n : {1, 2, 3, 4, 7}) {
    std::vector<int> seen(static_cast<size_t>(n * 14));
    for (int r = 0; r < n; ++r) {
      int64_t pairs = 0;  // queries x visible keys: the same for every rank
      for (const RowRange& range : context_ranges(n * 14, n, r))
        for (int64_t i = range.begin; i < range.end; ++i) {
          ++seen[static_cast<size_t>(i)];
          pairs += i + 1;
        }
      EXPECT_EQ(pairs, int64_t{7} * (n * 14 + 1));
    }
    EXPECT_EQ(seen, std::vector<int>(static_cast<size_t>(n * 14), 1));
  }
}

TEST(ContextSplit, JoinUndoesSplit) {
  const Tensor x = testing::normal({2, 24, 3}, 5);
  for (const int n : {1, 2, 3, 4, 6, 12}) {
    std::vector<Tensor> parts;
    for (int r = 0; r < n; ++r) {
      parts.push_back(split_sequence(x, n, r));
      EXPECT_TRUE(parts.back().is_contiguous());
      EXPECT_TRUE(at::equal(parts.back(), x.index_select(1, context_row_index(24, n, r))));
    }
    EXPECT_TRUE(at::equal(join_sequence(parts), x));
  }
}

TEST(ContextSplit, LengthsThatDoNotDivideAreRefused) {
  EXPECT_THROW((void)context_ranges(18, 2, 0), InternalError);
  EXPECT_THROW((void)context_ranges(16, 2, 2), InternalError);
  EXPECT_THROW((void)split_sequence(at::zeros({1, 6}), 2, 0), InternalError);
  EXPECT_THROW((void)join_sequence({at::zeros({1, 2}), at::zeros({1, 4})}), InternalError);
}

struct Documents {
  int64_t length;  // 0: joined
  int64_t samples;
};

// first_key of the whole rows: documents of `length`, shifted in the second sample.
std::vector<std::vector<int64_t>> first_keys(const Documents& d, int64_t tokens) {
  std::vector<std::vector<int64_t>> rows;
  for (int64_t s = 0; s < d.samples; ++s) {
    std::vector<int64_t> row;
    for (int64_t i = 0; i < tokens; ++i)
      row.push_back(d.length == 0 ? 0 : std::max<int64_t>(0, (i + s) / d.length * d.length - s));
    rows.push_back(row);
  }
  return rows;
}

using Matrix = std::vector<std::vector<int>>;  // local queries x local keys: how often seen

// What the blocks of a hop see, as ops::AttentionMask defines it.
Matrix seen_by_blocks(const std::vector<RingBlock>& blocks, const std::vector<int64_t>& first_key,
                      std::optional<int64_t> window, int64_t tokens) {
  Matrix seen(static_cast<size_t>(tokens), std::vector<int>(static_cast<size_t>(tokens)));
  for (const RingBlock& b : blocks)
    for (int64_t t = 0; t < b.queries; ++t) {
      const int64_t last = t + b.query_offset;
      int64_t first = 0;
      if (b.windowed) first = std::max(first, last - *window + 1);
      if (b.documents)
        first = std::max(first, first_key[static_cast<size_t>(b.query_begin + t)] - b.key_row);
      for (int64_t k = first; k <= std::min(last, b.keys - 1); ++k)
        ++seen[static_cast<size_t>(b.query_begin + t)][static_cast<size_t>(b.key_begin + k)];
    }
  return seen;
}

std::vector<int64_t> rows_of(int64_t length, int ranks, int rank) {
  std::vector<int64_t> rows;
  for (const RowRange& range : context_ranges(length, ranks, rank))
    for (int64_t i = range.begin; i < range.end; ++i) rows.push_back(i);
  return rows;
}

void check_hops(int n, std::optional<int64_t> window, const Documents& documents) {
  const int64_t length = 2 * n * 4, tokens = 8;
  const auto all_first = first_keys(documents, length);
  for (int q = 0; q < n; ++q)
    for (int k = 0; k < n; ++k) {
      const auto query_rows = rows_of(length, n, q), key_rows = rows_of(length, n, k);
      RingMask mask{.ranks = n, .row_length = length, .sliding_window = window};
      for (size_t half = 0; half < 2; ++half) {
        mask.first_keys[half] = {length, 0};
        for (const auto& row : all_first)
          for (size_t t = half * 4; t < half * 4 + 4; ++t) {
            const int64_t first = row[static_cast<size_t>(query_rows[t])];
            auto& keys = mask.first_keys[half];
            keys = {std::min(keys.lowest, first), std::max(keys.highest, first)};
          }
      }
      const auto blocks = ring_blocks(mask, q, k);
      bool any_in_sample = false;
      for (const auto& row : all_first) {
        std::vector<int64_t> first;
        for (const int64_t i : query_rows) first.push_back(row[static_cast<size_t>(i)]);
        const Matrix seen = seen_by_blocks(blocks, first, window, tokens);
        for (size_t t = 0; t < 8; ++t)
          for (size_t s = 0; s < 8; ++s) {
            const int64_t i = query_rows[t], j = key_rows[s];
            const bool want = j <= i && j >= first[t] && (!window || j > i - *window);
            any_in_sample |= want;
            ASSERT_EQ(seen[t][s], want ? 1 : 0)
                << "ranks " << n << " window " << window.value_or(0) << " documents "
                << documents.length << " query " << i << " of rank " << q << " key " << j
                << " of rank " << k;
          }
      }
      if (documents.samples == 1 || documents.length == 0) {
        EXPECT_EQ(blocks.empty(), !any_in_sample) << "a hop without keys computes nothing";
      }
    }
}

TEST(RingBlocks, SeeWhatTheMaskOfWholeRowsAllows) {
  for (const int n : {1, 2, 3, 4, 5})
    for (const int64_t window : {0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 40})
      for (const int64_t documents : {0, 1, 3, 4, 6, 9, 16})
        for (const int64_t samples : {1, 2})
          if (n > 1)
            check_hops(n, window > 0 ? std::optional(window) : std::nullopt, {documents, samples});
}

// Without windows and documents every hop is one call, except that of the rank's own keys.
TEST(RingBlocks, WholeBlocksAreJoined) {
  const RingMask mask{.ranks = 4, .row_length = 64};
  EXPECT_EQ(ring_blocks(mask, 2, 2).size(), 3u);
  const auto early = ring_blocks(mask, 2, 1), late = ring_blocks(mask, 1, 2);
  ASSERT_EQ(early.size(), 1u);
  EXPECT_EQ(early[0].queries, 16);
  EXPECT_EQ(early[0].keys, 8);
  EXPECT_EQ(early[0].key_begin, 0);
  ASSERT_EQ(late.size(), 1u);
  EXPECT_EQ(late[0].queries, 8);
  EXPECT_EQ(late[0].query_begin, 8);
  EXPECT_EQ(late[0].keys, 16);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

ops::AttentionParts attended(const Tensor& q, const Tensor& k, const Tensor& v) {
  return ops::attention_forward(q, k, v, 0.5, {.query_offset = k.size(1)});
}

TEST(RingMerge, PartsOfTheKeysMakeTheWhole) {
  const Tensor q = testing::normal({2, 5, 4, 6}, 1) * 3, k = testing::normal({2, 9, 2, 6}, 2) * 3;
  const Tensor v = testing::normal({2, 9, 2, 6}, 3);
  const auto want = attended(q, k, v);
  const MergedAttention merged = nothing_seen(q);
  for (const auto& [begin, count] :
       std::vector<std::pair<int64_t, int64_t>>{{6, 3}, {0, 1}, {1, 5}})
    merge_(merged, attended(q, k.narrow(1, begin, count), v.narrow(1, begin, count)), 0);
  EXPECT_TRUE(testing::near(merged.out_BtNH, want.out_BTNH));
  EXPECT_TRUE(testing::near(merged.lse_BNt, want.lse_BNT));
}

TEST(RingMerge, NothingSeenHasWeightZeroOnEitherSide) {
  const Tensor q = testing::normal({1, 4, 2, 3}, 1);
  const ops::AttentionParts nothing{at::zeros({1, 4, 2, 3}, at::kDouble),
                                    at::full({1, 2, 4}, -kInfinity, at::kDouble)};
  const auto some = attended(q, testing::normal({1, 6, 2, 3}, 2), testing::normal({1, 6, 2, 3}, 3));
  const MergedAttention merged = nothing_seen(q);
  merge_(merged, nothing, 0);
  EXPECT_TRUE(at::equal(merged.out_BtNH, nothing.out_BTNH));  // -inf with -inf: no NaN
  EXPECT_TRUE(at::equal(merged.lse_BNt, nothing.lse_BNT));
  merge_(merged, some, 0);
  EXPECT_TRUE(at::equal(merged.out_BtNH, some.out_BTNH));
  EXPECT_TRUE(at::equal(merged.lse_BNt, some.lse_BNT));
  merge_(merged, nothing, 0);
  EXPECT_TRUE(at::equal(merged.out_BtNH, some.out_BTNH));
  EXPECT_TRUE(at::equal(merged.lse_BNt, some.lse_BNT));
}

// Scores far beyond the range of exp.
TEST(RingMerge, LargeScoresDoNotOverflow) {
  const Tensor q = testing::normal({1, 3, 1, 4}, 1) * 100,
               k = testing::normal({1, 8, 1, 4}, 2) * 100;
  const Tensor v = testing::normal({1, 8, 1, 4}, 3);
  const MergedAttention merged = nothing_seen(q);
  merge_(merged, attended(q, k.narrow(1, 0, 4), v.narrow(1, 0, 4)), 0);
  merge_(merged, attended(q, k.narrow(1, 4, 4), v.narrow(1, 4, 4)), 0);
  const auto want = attended(q, k, v);
  EXPECT_TRUE(testing::near(merged.out_BtNH, want.out_BTNH));
  EXPECT_TRUE(testing::near(merged.lse_BNt, want.lse_BNT));
}

TEST(RingMerge, PartOfTheQueries) {
  const Tensor q = testing::normal({1, 6, 2, 4}, 1), k = testing::normal({1, 5, 2, 4}, 2);
  const Tensor v = testing::normal({1, 5, 2, 4}, 3);
  const MergedAttention merged = nothing_seen(q);
  merge_(merged, attended(q.narrow(1, 2, 3), k, v), 2);
  EXPECT_TRUE(
      at::equal(merged.out_BtNH.narrow(1, 2, 3), attended(q.narrow(1, 2, 3), k, v).out_BTNH));
  for (const int64_t untouched : {0, 1, 5}) {
    EXPECT_EQ(merged.out_BtNH.select(1, untouched).abs().max().item<double>(), 0);
    EXPECT_EQ(merged.lse_BNt.select(2, untouched).max().item<double>(), -kInfinity);
  }
}

}  // namespace
}  // namespace capstan::parallel
