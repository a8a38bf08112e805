// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Flat ranges against element-by-element bookkeeping.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "capstan/base/error.h"
#include "capstan/plan/layout.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

int64_t pick(std::mt19937_64& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

// Row-major index in a global tensor of every element of a box, in memory order.
std::vector<int64_t> elements_of(const Box& box, const Shape& global) {
  std::vector<int64_t> elements;
  std::vector<int64_t> at = box.begin;
  for (int64_t n = box.numel(); n > 0; --n) {
    int64_t index = 0;
    for (size_t d = 0; d < global.size(); ++d) index = index * global[d] + at[d];
    elements.push_back(index);
    for (size_t d = global.size(); d-- > 0;) {
      if (++at[d] < box.begin[d] + box.extent[d]) break;
      at[d] = box.begin[d];
    }
  }
  return elements;
}

// Global index of each local element of a parameter, -1 for padding.
std::vector<int64_t> truth(const LocalParam& param, const Shape& global) {
  std::vector<int64_t> map;
  std::vector<int64_t> at(global.size(), 0);
  for (int64_t n = 0; n < param.numel(); ++n) {
    int64_t index = 0;
    bool real = true;
    for (size_t d = 0; d < global.size(); ++d) {
      real = real && at[d] < param.real.extent[d];
      index = index * global[d] + param.real.begin[d] + at[d];
    }
    map.push_back(real ? index : -1);
    for (size_t d = global.size(); d-- > 0;) {
      if (++at[d] < param.local_shape[d]) break;
      at[d] = 0;
    }
  }
  return map;
}

std::vector<int64_t> by_runs(const LocalParam& param, const Shape& global, int64_t begin,
                             int64_t end) {
  std::vector<int64_t> map(static_cast<size_t>(param.numel()), -1);
  int64_t last = -1;
  for_each_run(param, global, begin, end,
               [&](int64_t global_index, int64_t local_index, int64_t count) {
                 EXPECT_GT(count, 0);
                 EXPECT_GT(local_index, last);
                 last = local_index + count - 1;
                 for (int64_t i = 0; i < count; ++i)
                   map[static_cast<size_t>(local_index + i)] = global_index + i;
               });
  return map;
}

std::vector<int64_t> by_pieces(const FlatBuffer& buffer, const std::vector<ParamSpec>& table,
                               int64_t begin, int64_t end) {
  std::vector<int64_t> map(static_cast<size_t>(buffer.numel), -1);
  int64_t last = -1;
  for (const FlatPiece& piece : pieces_of(buffer, table, begin, end)) {
    const LocalParam& param = buffer.params.at(static_cast<size_t>(piece.param));
    const Shape& global = table[static_cast<size_t>(param.spec)].shape;
    EXPECT_GT(piece.offset, last);
    EXPECT_GT(piece.box.numel(), 0);
    EXPECT_EQ(intersect(piece.box, param.real), piece.box);
    int64_t place = begin + piece.offset;
    for (const int64_t element : elements_of(piece.box, global))
      map[static_cast<size_t>(place++)] = element;
    last = piece.offset + piece.box.numel() - 1;
  }
  EXPECT_LT(last, std::max<int64_t>(end - begin, 1));
  return map;
}

FlatBuffer buffer_of(LocalParam param, int64_t flat_begin) {
  FlatBuffer buffer;
  param.flat_begin = flat_begin;
  buffer.numel = flat_begin + param.numel() + 7;
  buffer.params.push_back(std::move(param));
  return buffer;
}

TEST(Pieces, RunsAndBoxesMatchEveryElementOfRandomLocalParts) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 400; ++round) {
    Shape global(static_cast<size_t>(pick(random, 1, 4)));
    LocalParam param;
    param.local_shape.resize(global.size());
    param.real = whole_box(global);
    for (size_t d = 0; d < global.size(); ++d) {
      global[d] = pick(random, 1, 6);
      const bool whole = pick(random, 0, 2) == 0;
      param.real.begin[d] = whole ? 0 : pick(random, 0, global[d] - 1);
      param.real.extent[d] = whole ? global[d] : pick(random, 0, global[d] - param.real.begin[d]);
      param.local_shape[d] =
          std::max<int64_t>(1, param.real.extent[d] + (pick(random, 0, 3) == 0 ? 2 : 0));
    }
    const std::vector<int64_t> expected = truth(param, global);
    const int64_t n = param.numel(), begin = pick(random, 0, n), end = pick(random, begin, n);
    std::vector<int64_t> clipped(static_cast<size_t>(n), -1);
    std::copy(expected.begin() + begin, expected.begin() + end, clipped.begin() + begin);
    ASSERT_EQ(by_runs(param, global, begin, end), clipped) << "round " << round;
    const int64_t flat_begin = pick(random, 0, 5);
    const FlatBuffer buffer = buffer_of(param, flat_begin);
    std::vector<ParamSpec> table(1);
    table[0].shape = global;
    std::vector<int64_t> map = by_pieces(buffer, table, flat_begin + begin, flat_begin + end);
    map.erase(map.begin(), map.begin() + flat_begin);
    map.resize(static_cast<size_t>(n));
    ASSERT_EQ(map, clipped) << "round " << round;
    // A range that begins before and ends after the parameter clips to it.
    ASSERT_EQ(pieces_of(buffer, table, 0, buffer.numel).size(),
              pieces_of(buffer, table, flat_begin, flat_begin + n).size());
  }
}

TEST(Pieces, ARangeOfAMatrixIsAtMostThreeBoxes) {
  LocalParam param;
  param.local_shape = {10, 8};
  param.real = whole_box({10, 8});
  std::vector<ParamSpec> table(1);
  table[0].shape = {10, 8};
  const FlatBuffer buffer = buffer_of(param, 0);
  const auto pieces = pieces_of(buffer, table, 13, 61);
  ASSERT_EQ(pieces.size(), 3u);
  EXPECT_EQ(pieces[0].box, (Box{{1, 5}, {1, 3}}));
  EXPECT_EQ(pieces[0].offset, 0);
  EXPECT_EQ(pieces[1].box, (Box{{2, 0}, {5, 8}}));
  EXPECT_EQ(pieces[1].offset, 3);
  EXPECT_EQ(pieces[2].box, (Box{{7, 0}, {1, 5}}));
  EXPECT_EQ(pieces[2].offset, 43);
  for (int64_t begin = 0; begin <= 80; ++begin)
    for (int64_t end = begin; end <= 80; ++end)
      ASSERT_LE(pieces_of(buffer, table, begin, end).size(), 3u);
  EXPECT_EQ(pieces_of(buffer, table, 0, 80).size(), 1u);
  EXPECT_TRUE(pieces_of(buffer, table, 5, 5).empty());
  EXPECT_TRUE(pieces_of(buffer, table, 80, 87).empty());  // padding
}

TEST(Pieces, AWholeMatrixIsOneRun) {
  LocalParam param;
  param.local_shape = {1000, 64};
  param.real = whole_box({1000, 64});
  int runs = 0;
  for_each_run(param, {1000, 64}, 0, 64000, [&](int64_t global, int64_t local, int64_t count) {
    ++runs;
    EXPECT_EQ(global, 0);
    EXPECT_EQ(local, 0);
    EXPECT_EQ(count, 64000);
  });
  EXPECT_EQ(runs, 1);
}

TEST(Pieces, RangesOutsideAreRefused) {
  LocalParam param;
  param.local_shape = {4};
  param.real = whole_box({4});
  const auto ignore = [](int64_t, int64_t, int64_t) {};
  EXPECT_THROW(for_each_run(param, {4}, 0, 5, ignore), InternalError);
  EXPECT_THROW(for_each_run(param, {4}, -1, 2, ignore), InternalError);
  EXPECT_THROW(for_each_run(param, {4, 1}, 0, 2, ignore), InternalError);
  std::vector<ParamSpec> table(1);
  table[0].shape = {4};
  EXPECT_THROW((void)pieces_of(buffer_of(param, 0), table, 0, 12), InternalError);
  EXPECT_THROW((void)pieces_of(buffer_of(param, 0), table, 3, 2), InternalError);
}

// Law of storage: over the shards of the counted holders, every real element appears exactly once.
TEST(Pieces, ShardsOfCountedHoldersCoverEveryElementOnce) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 60; ++round) {
    ModelShape shape = testing::tiny_shape();
    Grid::Sizes sizes;
    sizes.tp = 1 << pick(random, 0, 2);
    sizes.cp = static_cast<int>(pick(random, 1, 2));
    sizes.dp_shard = static_cast<int>(pick(random, 1, 3));
    sizes.dp_replicate = static_cast<int>(pick(random, 1, 2));
    sizes.pp = static_cast<int>(pick(random, 1, 3));
    shape.num_key_value_heads = 1 << pick(random, 0, 3);
    shape.vocab_size = pick(random, 3, 400);
    shape.attention_bias = pick(random, 0, 1) == 1;
    shape.attention_output_bias = pick(random, 0, 1) == 1;
    shape.qk_norm = pick(random, 0, 1) == 1;
    shape.tie_word_embeddings = pick(random, 0, 1) == 1;
    LayoutOptions options;
    options.grid = Grid(sizes);
    options.zero_stage = static_cast<int>(pick(random, 0, 3));
    options.sequence_parallel = pick(random, 0, 1) == 1;
    options.vocab_multiple = pick(random, 1, 8);
    const Layout layout(shape, testing::table_of(shape), options);
    const auto& table = layout.table();
    std::vector<std::vector<int>> count;
    for (const ParamSpec& spec : table)
      count.emplace_back(static_cast<size_t>(numel(spec.shape)), 0);
    for (int rank = 0; rank < options.grid.size(); ++rank) {
      if (options.grid.coord(rank).dp_replicate != 0) continue;  // replicas hold the same
      const RankLayout own = layout.rank(rank);
      for (const FlatBuffer& buffer : own.buffers) {
        const int shard = options.grid.index_along(buffer.shard_axes, rank);
        if (options.grid.index_along(buffer.replica_axes(), rank) != 0) continue;
        const int64_t begin = shard * buffer.shard_numel();
        for (const FlatPiece& piece :
             pieces_of(buffer, table, begin, begin + buffer.shard_numel())) {
          const LocalParam& param = buffer.params[static_cast<size_t>(piece.param)];
          if (!param.counted) continue;
          for (const int64_t element :
               elements_of(piece.box, table[static_cast<size_t>(param.spec)].shape))
            ++count[static_cast<size_t>(param.spec)][static_cast<size_t>(element)];
        }
      }
    }
    for (size_t spec = 0; spec < table.size(); ++spec)
      for (const int times : count[spec])
        ASSERT_EQ(times, 1) << table[spec].name << ", round " << round;
  }
}

TEST(Boxes, IntersectAndCount) {
  const Box a{{0, 4}, {10, 4}}, b{{5, 6}, {10, 10}};
  EXPECT_EQ(intersect(a, b), (Box{{5, 6}, {5, 2}}));
  EXPECT_EQ(intersect(a, Box{{10, 4}, {1, 1}}).numel(), 0);
  EXPECT_EQ(numel(Region{a, b}), 140);
  EXPECT_THROW((void)intersect(a, Box{{0}, {1}}), InternalError);
  EXPECT_EQ(numel(Shape{}), 1);
  EXPECT_THROW((void)numel(Shape{int64_t{1} << 40, int64_t{1} << 40}), InternalError);
}

}  // namespace
}  // namespace capstan::plan
