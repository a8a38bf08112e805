// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/layout.h"

#include <gtest/gtest.h>

#include <map>

#include "capstan/base/error.h"
#include "capstan/plan/frozen.h"
#include "shapes.h"

namespace capstan::plan {
namespace {

using testing::index_of;
using testing::table_of;

Layout make_layout(const ModelShape& shape, const Grid::Sizes& sizes, LayoutOptions options = {}) {
  options.grid = Grid(sizes);
  return {shape, table_of(shape), options};
}

// What a rank holds of a named parameter.
struct Held {
  LocalParam param;
  FlatBuffer buffer;
};
Held held(const Layout& layout, int rank, const std::string& name) {
  const int spec = index_of(layout.table(), name);
  for (const FlatBuffer& buffer : layout.rank(rank).buffers)
    for (const LocalParam& param : buffer.params)
      if (param.spec == spec) return {param, buffer};
  ADD_FAILURE() << name << " is not on rank " << rank;
  return {};
}

TEST(Layout, OneRankHoldsEverythingWhole) {
  const ModelShape shape = testing::quickstart_shape();
  const Layout layout = make_layout(shape, {});
  const RankLayout rank = layout.rank(0);
  EXPECT_EQ(rank.blocks, (std::vector<int>{0, 1, 2, 3, 4, 5}));
  ASSERT_EQ(rank.buffers.size(), 6u);  // the tied head keeps only its norm
  size_t params = 0;
  for (const FlatBuffer& buffer : rank.buffers) {
    EXPECT_EQ(buffer.sum_axes, kDenseAxes);
    EXPECT_EQ(buffer.shards, 1);
    EXPECT_EQ(buffer.numel % 256, 0);
    for (const LocalParam& param : buffer.params) {
      const ParamSpec& spec = layout.table()[static_cast<size_t>(param.spec)];
      EXPECT_EQ(param.local_shape, spec.shape);
      EXPECT_EQ(param.real, whole_box(spec.shape));
      EXPECT_TRUE(param.extra_sum.empty());
      EXPECT_TRUE(param.counted);
      EXPECT_EQ(param.holders, 1);
      ++params;
    }
  }
  EXPECT_EQ(params, layout.table().size());
  EXPECT_EQ(rank.numel(),
            count_parameters(layout.table()));  // every size here is a multiple of 256
}

TEST(Layout, FuseGroupsLieSideBySideAndGroupsAreAligned) {
  ModelShape shape = testing::tiny_shape();
  shape.attention_bias = shape.attention_output_bias = true;
  const Layout layout = make_layout(shape, {.dp_replicate = 3});
  for (const FlatBuffer& buffer : layout.rank(2).buffers) {
    for (size_t i = 0; i < buffer.params.size(); ++i) {
      const LocalParam& param = buffer.params[i];
      const ParamSpec& spec = layout.table()[static_cast<size_t>(param.spec)];
      const bool joined =
          i > 0 && spec.fuse_group >= 0 &&
          layout.table()[static_cast<size_t>(buffer.params[i - 1].spec)].fuse_group ==
              spec.fuse_group;
      const int64_t gap =
          joined ? param.flat_begin - buffer.params[i - 1].flat_begin - buffer.params[i - 1].numel()
                 : param.flat_begin % 256;
      EXPECT_EQ(gap, 0) << spec.name;
    }
  }
  const int64_t q = held(layout, 0, "model.layers.1.self_attn.q_proj.weight").param.flat_begin;
  EXPECT_EQ(held(layout, 0, "model.layers.1.self_attn.k_proj.weight").param.flat_begin,
            q + 16 * 12);
  EXPECT_EQ(held(layout, 0, "model.layers.1.self_attn.v_proj.weight").param.flat_begin,
            q + 16 * 12 + 4 * 12);
  const int64_t gate = held(layout, 0, "model.layers.1.mlp.gate_proj.weight").param.flat_begin;
  EXPECT_EQ(held(layout, 0, "model.layers.1.mlp.up_proj.weight").param.flat_begin, gate + 24 * 12);
}

TEST(Layout, TableOrderDoesNotTearAFuseGroupApart) {
  const ModelShape shape = testing::tiny_shape();
  std::vector<ParamSpec> table = table_of(shape);
  const int k = index_of(table, "model.layers.0.self_attn.k_proj.weight");
  const int norm = index_of(table, "model.layers.0.post_attention_layernorm.weight");
  std::swap(table[static_cast<size_t>(k)], table[static_cast<size_t>(norm)]);
  const Layout layout(shape, table, {});
  const int64_t q = held(layout, 0, "model.layers.0.self_attn.q_proj.weight").param.flat_begin;
  EXPECT_EQ(held(layout, 0, "model.layers.0.self_attn.v_proj.weight").param.flat_begin,
            q + 16 * 12);
  EXPECT_EQ(held(layout, 0, "model.layers.0.self_attn.k_proj.weight").param.flat_begin,
            q + 20 * 12);
}

TEST(Layout, TensorAxisCutsByRule) {
  ModelShape shape = testing::tiny_shape();
  shape.num_key_value_heads = 4;
  const Layout layout = make_layout(shape, {.tp = 2});
  const LocalParam q = held(layout, 1, "model.layers.0.self_attn.q_proj.weight").param;
  EXPECT_EQ(q.local_shape, (Shape{8, 12}));
  EXPECT_EQ(q.real, (Box{{8, 0}, {8, 12}}));
  const LocalParam k = held(layout, 1, "model.layers.0.self_attn.k_proj.weight").param;
  EXPECT_EQ(k.real, (Box{{4, 0}, {4, 12}}));
  EXPECT_TRUE(k.extra_sum.empty());
  const LocalParam o = held(layout, 1, "model.layers.0.self_attn.o_proj.weight").param;
  EXPECT_EQ(o.local_shape, (Shape{12, 8}));
  EXPECT_EQ(o.real, (Box{{0, 8}, {12, 8}}));
  const LocalParam norm = held(layout, 1, "model.layers.0.input_layernorm.weight").param;
  EXPECT_EQ(norm.local_shape, Shape{12});
  EXPECT_FALSE(norm.counted);
  EXPECT_TRUE(held(layout, 0, "model.layers.0.input_layernorm.weight").param.counted);
  EXPECT_TRUE(norm.extra_sum.empty());
}

TEST(Layout, VocabularyRowsArePaddedLocally) {
  const ModelShape shape = testing::tiny_shape();  // 97 rows over 2 ranks: 49, padded to 64
  const Layout layout = make_layout(shape, {.tp = 2});
  const LocalParam first = held(layout, 0, "lm_head.weight").param,
                   second = held(layout, 1, "lm_head.weight").param;
  EXPECT_EQ(first.local_shape, (Shape{64, 12}));
  EXPECT_EQ(first.real, (Box{{0, 0}, {64, 12}}));
  EXPECT_EQ(second.local_shape, (Shape{64, 12}));
  EXPECT_EQ(second.real, (Box{{64, 0}, {33, 12}}));
  // More ranks than the rows need: the last holds padding only.
  const Layout wide = make_layout(shape, {.tp = 4});
  EXPECT_EQ(held(wide, 3, "lm_head.weight").param.real.numel(), 0);
  // One rank has no padding.
  EXPECT_EQ(held(make_layout(shape, {}), 0, "lm_head.weight").param.local_shape, (Shape{97, 12}));
}

TEST(Layout, KeyValueHeadsAreCopiedWhenThereAreTooFew) {
  const ModelShape shape = testing::tiny_shape();  // 2 key/value heads on 4 ranks
  const Layout layout = make_layout(shape, {.tp = 4});
  for (int rank = 0; rank < 4; ++rank) {
    const LocalParam k = held(layout, rank, "model.layers.0.self_attn.k_proj.weight").param;
    EXPECT_EQ(k.real, (Box{{rank / 2 * 2, 0}, {2, 12}}));
    EXPECT_EQ(k.holders, 2);
    EXPECT_EQ(k.counted, rank % 2 == 0);
    EXPECT_EQ(k.extra_sum, AxisSet(Axis::kTp));
    EXPECT_EQ(held(layout, rank, "model.layers.0.self_attn.q_proj.weight").param.holders, 1);
  }
}

TEST(Layout, ExtraSumsFollowSiteAndSequenceParallel) {
  ModelShape shape = testing::tiny_shape();
  shape.attention_bias = shape.attention_output_bias = true;
  const std::string norm = "model.layers.0.input_layernorm.weight",
                    row_bias = "model.layers.0.self_attn.o_proj.bias",
                    column_bias = "model.layers.0.self_attn.q_proj.bias";
  const Layout plain = make_layout(shape, {.tp = 2});
  EXPECT_TRUE(held(plain, 1, norm).param.extra_sum.empty());
  EXPECT_TRUE(held(plain, 1, row_bias).param.extra_sum.empty());
  EXPECT_TRUE(held(plain, 1, column_bias).param.extra_sum.empty());
  const Layout sequence = make_layout(shape, {.tp = 2}, {.sequence_parallel = true});
  EXPECT_EQ(held(sequence, 1, norm).param.extra_sum, AxisSet(Axis::kTp));
  EXPECT_EQ(held(sequence, 1, row_bias).param.extra_sum, AxisSet(Axis::kTp));
  EXPECT_TRUE(held(sequence, 1, column_bias).param.extra_sum.empty());
  // A norm of single heads sees a part of the gradient on every rank.
  shape.qk_norm = true;
  const std::string head_norm = "model.layers.0.self_attn.k_norm.weight";
  for (const bool sequence_parallel : {false, true}) {
    const LayoutOptions options{.sequence_parallel = sequence_parallel};
    EXPECT_EQ(held(make_layout(shape, {.tp = 2}, options), 1, head_norm).param.extra_sum,
              AxisSet(Axis::kTp));
    EXPECT_TRUE(held(make_layout(shape, {}, options), 0, head_norm)
                    .param.extra_sum.empty());  // nobody to sum with
  }
}

TEST(Layout, ShardsAreMultiplesOfTheAlignment) {
  const ModelShape shape = testing::tiny_shape();
  for (const int shard_size : {2, 3, 5}) {
    const Layout layout =
        make_layout(shape, {.dp_replicate = 2, .dp_shard = shard_size, .cp = 2}, {.zero_stage = 1});
    for (const FlatBuffer& buffer : layout.rank(0).buffers) {
      EXPECT_EQ(buffer.shards, shard_size * 2);
      EXPECT_EQ(buffer.shard_numel() % 256, 0);
      EXPECT_EQ(buffer.shard_axes, AxisSet(Axis::kDpShard) | Axis::kCp);
    }
  }
  EXPECT_EQ(make_layout(shape, {.dp_shard = 4}).rank(0).buffers.front().shards,
            1);  // stage 0 cuts nothing
}

TEST(Layout, FrozenBlocksHaveBuffersThatAreNotTrained) {
  const ModelShape shape = testing::tiny_shape();
  const Layout layout(shape, freeze_blocks(table_of(shape), std::vector{0, 2}),
                      {.grid = Grid(Grid::Sizes{})});
  const RankLayout rank = layout.rank(0);
  for (const FlatBuffer& buffer : rank.buffers)
    EXPECT_EQ(buffer.trainable, buffer.block != 0 && buffer.block != 2);
  EXPECT_LT(rank.numel(true), rank.numel());
  for (const auto& bucket : make_buckets(rank, DType::kFp32, 1 << 30))
    for (const int i : bucket) EXPECT_TRUE(rank.buffers[static_cast<size_t>(i)].trainable);
}

TEST(Layout, UpdateKindsGetBuffersOfTheirOwn) {
  const ModelShape shape = testing::tiny_shape();
  std::vector<ParamSpec> table = table_of(shape);
  for (ParamSpec& spec : table)
    if (spec.shape.size() == 2) spec.update = UpdateKind::kMatrix;
  const RankLayout rank = Layout(shape, table, {}).rank(0);
  std::map<int, int> buffers_of_block;
  for (const FlatBuffer& buffer : rank.buffers) {
    ++buffers_of_block[buffer.block];
    for (const LocalParam& param : buffer.params)
      EXPECT_EQ(table[static_cast<size_t>(param.spec)].update, buffer.update);
  }
  EXPECT_EQ(buffers_of_block, (std::map<int, int>{{0, 1}, {1, 2}, {2, 2}, {3, 2}, {4, 2}}));
}

TEST(Layout, StagesShareOutTheBlocks) {
  ModelShape shape = testing::tiny_shape();
  shape.num_hidden_layers = 5;
  const Layout layout = make_layout(shape, {.pp = 2});
  EXPECT_EQ(layout.rank(0).blocks, (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(layout.rank(1).blocks, (std::vector<int>{4, 5, 6}));
  const Layout uneven = make_layout(shape, {.pp = 2}, {.stage_begin = {0, 2}});
  EXPECT_EQ(uneven.rank(0).blocks, (std::vector<int>{0, 1}));
  EXPECT_THROW(make_layout(shape, {.pp = 2}, {.stage_begin = {0, 7}}), InternalError);
  EXPECT_THROW(make_layout(shape, {.pp = 2}, {.stage_begin = {1, 3}}), InternalError);
  EXPECT_THROW(make_layout(shape, {.pp = 2}, {.stage_begin = {0}}), InternalError);
}

TEST(Layout, TiedEmbeddingLiesAlikeOnFirstAndLastStage) {
  ModelShape shape = testing::tiny_shape();
  shape.tie_word_embeddings = true;
  const Layout layout = make_layout(shape, {.pp = 2, .tp = 2});
  const Held first = held(layout, 1, "model.embed_tokens.weight"),
             last = held(layout, 3, "model.embed_tokens.weight");
  EXPECT_EQ(first.param.real, last.param.real);
  EXPECT_EQ(first.buffer.numel, last.buffer.numel);
  EXPECT_EQ(first.param.extra_sum, AxisSet(Axis::kPp));
  EXPECT_EQ(last.param.extra_sum, AxisSet(Axis::kPp));
  EXPECT_TRUE(first.param.counted);
  EXPECT_FALSE(last.param.counted);
  // On one stage both uses share one buffer.
  const RankLayout whole = make_layout(shape, {}).rank(0);
  int copies = 0;
  for (const FlatBuffer& buffer : whole.buffers) copies += buffer.block == 0;
  EXPECT_EQ(copies, 1);
  EXPECT_TRUE(whole.buffers.front().params.front().extra_sum.empty());
}

TEST(Layout, WhatItCannotCutIsRefused) {
  const ModelShape shape = testing::tiny_shape();
  EXPECT_THROW((void)make_layout(shape, {.tp = 5}).rank(0), InternalError);
  std::vector<ParamSpec> table = table_of(shape);
  table[static_cast<size_t>(index_of(table, "model.layers.0.mlp.up_proj.weight"))].tensor.groups =
      2;
  LayoutOptions options;
  options.grid = Grid({.tp = 2});
  EXPECT_THROW((void)Layout(shape, table, options).rank(0), InternalError);
  options.grid = Grid(Grid::Sizes{});
  EXPECT_NO_THROW((void)Layout(shape, table, options).rank(0));
}

TEST(Buckets, FollowBackwardOrderAndTheLimit) {
  ModelShape shape = testing::quickstart_shape();
  const RankLayout rank = make_layout(shape, {.dp_replicate = 2}).rank(0);
  // Head norm 256, layers 737,792 (+ padding none), embedding 2,097,152 elements.
  const int64_t layer_bytes = 737'792 * 4;
  const auto blocks_of = [&](int64_t limit) {
    std::vector<std::vector<int>> blocks;
    for (const auto& bucket : make_buckets(rank, DType::kFp32, limit)) {
      blocks.emplace_back();
      for (const int i : bucket)
        blocks.back().push_back(rank.buffers[static_cast<size_t>(i)].block);
    }
    return blocks;
  };
  using Blocks = std::vector<std::vector<int>>;
  EXPECT_EQ(blocks_of(1), (Blocks{{5}, {4}, {3}, {2}, {1}, {0}}));
  EXPECT_EQ(blocks_of(2 * layer_bytes), (Blocks{{5, 4}, {3, 2}, {1}, {0}}));
  EXPECT_EQ(blocks_of(2 * layer_bytes + 1024), (Blocks{{5, 4, 3}, {2, 1}, {0}}));
  EXPECT_EQ(blocks_of(int64_t{1} << 40), (Blocks{{5, 4, 3, 2, 1, 0}}));
  // Wider gradients fill a bucket sooner.
  EXPECT_EQ(make_buckets(rank, DType::kFp64, 2 * layer_bytes).size(), 6u);
}

TEST(Buckets, ATiedEmbeddingOnTheLastStageComesLast) {
  ModelShape shape = testing::tiny_shape();
  shape.tie_word_embeddings = true;
  const RankLayout rank = make_layout(shape, {.pp = 2}).rank(1);
  const auto buckets = make_buckets(rank, DType::kFp32, 1);
  EXPECT_EQ(rank.buffers[static_cast<size_t>(buckets.back().back())].block, 0);
  EXPECT_EQ(rank.buffers[static_cast<size_t>(buckets.front().front())].block, 4);
}

}  // namespace
}  // namespace capstan::plan
