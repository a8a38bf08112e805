// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/layout.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"

namespace capstan::plan {
namespace {

constexpr int64_t kAlignment = 256;  // elements

struct Cut {
  int64_t begin = 0, extent = 0;  // real part along the dim
  int64_t local = 0;              // stored size along the dim
  int holders = 1;
};

Cut cut_split(const ParamSpec& spec, const ShardRule& rule, int parts_wanted, int index) {
  const int64_t size = spec.shape.at(static_cast<size_t>(rule.dim));
  int64_t parts = parts_wanted;
  int holders = 1;
  if (rule.units > 0 &&
      parts_wanted > rule.units) {  // fewer units than ranks: several hold the same
    CAPSTAN_CHECK(parts_wanted % rule.units == 0, "{}: {} ranks do not divide by {} units",
                  spec.name, parts_wanted, rule.units);
    parts = rule.units;
    holders = static_cast<int>(parts_wanted / rule.units);
  }
  const int64_t unit_count = rule.units > 0 ? rule.units : size;
  CAPSTAN_CHECK(unit_count % parts == 0 && size % parts == 0,
                "{}: dimension {} of size {} does not divide into {} parts", spec.name, rule.dim,
                size, parts);
  CAPSTAN_CHECK(rule.groups == 1 || parts == 1,
                "{}: rows in {} groups are not cut by this layout; declare one parameter per group "
                "with a fuse group",
                spec.name, rule.groups);
  const int64_t part = size / parts;
  return {part * (index / holders), part, part, holders};
}

Cut cut_vocabulary(const ParamSpec& spec, int parts, int index, int64_t multiple) {
  const int64_t size = spec.shape.at(0);
  if (parts == 1) return {0, size, size, 1};
  const int64_t local = round_up((size + parts - 1) / parts, multiple);
  const int64_t begin = std::min(local * index, size);
  return {begin, std::min(local, size - begin), local, 1};
}

bool is_expert(const ParamSpec& spec) { return spec.expert >= 0; }

LocalParam whole_param(const ParamSpec& spec, int index) {
  LocalParam param;
  param.spec = index;
  param.local_shape = spec.shape;
  param.real = whole_box(spec.shape);
  return param;
}

// As a rank of the tensor axis holds a parameter that all experts share.
LocalParam cut_tensor(const ParamSpec& spec, int index, const LayoutOptions& options, int tp_rank) {
  const int tp = options.grid.sizes().tp;
  LocalParam param = whole_param(spec, index);
  if (spec.tensor.kind == ShardRule::Kind::kReplicate) {
    param.holders = tp;
  } else {
    const bool vocabulary = spec.tensor.kind == ShardRule::Kind::kVocab;
    const auto dim = static_cast<size_t>(vocabulary ? 0 : spec.tensor.dim);
    const Cut cut = vocabulary ? cut_vocabulary(spec, tp, tp_rank, options.vocab_multiple)
                               : cut_split(spec, spec.tensor, tp, tp_rank);
    param.local_shape[dim] = cut.local;
    param.real.begin[dim] = cut.begin;
    param.real.extent[dim] = cut.extent;
    param.holders = cut.holders;
  }
  param.counted = tp_rank % param.holders == 0;
  // A copy on the residual stream sees whole tensors, so its gradient is already complete, unless
  // the stream itself is cut along the sequence.
  const bool partial = spec.site == Site::kSplit || options.sequence_parallel;
  if (param.holders > 1 && partial) param.extra_sum = Axis::kTp;
  return param;
}

bool holds_expert(const ParamSpec& spec, const Grid& grid, int rank) {
  const int ep = grid.sizes().ep;
  CAPSTAN_CHECK(spec.num_experts % ep == 0, "{}: {} experts over {} ranks", spec.name,
                spec.num_experts, ep);
  return spec.expert / (spec.num_experts / ep) == grid.index_along(Axis::kEp, rank);
}

// Where one parameter stands in its block: its fuse group's first member, then declared order.
struct Member {
  int spec = 0;
  int group_first = 0;  // spec index of the first member of its fuse group
};

std::vector<Member> members_of_block(const std::vector<ParamSpec>& table, int block) {
  std::vector<Member> members;
  std::map<int, int> first_of_group;
  for (int i = 0; i < static_cast<int>(table.size()); ++i) {
    const ParamSpec& spec = table[static_cast<size_t>(i)];
    if (spec.block != block) continue;
    const int first =
        spec.fuse_group < 0 ? i : first_of_group.emplace(spec.fuse_group, i).first->second;
    members.push_back({i, first});
  }
  std::stable_sort(members.begin(), members.end(),
                   [](const Member& a, const Member& b) { return a.group_first < b.group_first; });
  return members;
}

void append(FlatBuffer& buffer, LocalParam param, bool starts_group) {
  if (starts_group) buffer.numel = round_up(buffer.numel, kAlignment);
  param.flat_begin = buffer.numel;
  buffer.numel += param.numel();
  buffer.params.push_back(std::move(param));
}

}  // namespace

int64_t Box::numel() const {
  int64_t product = 1;
  for (const int64_t size : extent) product *= std::max<int64_t>(size, 0);
  return product;
}

Box whole_box(const Shape& shape) { return {std::vector<int64_t>(shape.size(), 0), shape}; }

Box intersect(const Box& a, const Box& b) {
  CAPSTAN_CHECK(a.begin.size() == b.begin.size(), "boxes of {} and {} dimensions do not intersect",
                a.begin.size(), b.begin.size());
  Box box = a;
  for (size_t d = 0; d < a.begin.size(); ++d) {
    box.begin[d] = std::max(a.begin[d], b.begin[d]);
    const int64_t end = std::min(a.begin[d] + a.extent[d], b.begin[d] + b.extent[d]);
    box.extent[d] = std::max<int64_t>(0, end - box.begin[d]);
  }
  return box;
}

int64_t numel(const Region& region) {
  int64_t sum = 0;
  for (const Box& box : region) sum += box.numel();
  return sum;
}

int64_t RankLayout::numel(bool trainable_only) const {
  int64_t sum = 0;
  for (const FlatBuffer& buffer : buffers)
    if (buffer.trainable || !trainable_only) sum += buffer.numel;
  return sum;
}

int LayoutOptions::pipeline_rank_of(int stage) const {
  for (size_t rank = 0; rank < stage_of.size(); ++rank)
    for (const int held : stage_of[rank])
      if (held == stage) return static_cast<int>(rank);
  CAPSTAN_CHECK(false, "no pipeline rank holds stage {}", stage);
  return -1;
}

namespace {

// Layers in equal parts; the embedding goes with the first, the head with the last.
std::vector<int> equal_stages(int blocks, int stages) {
  std::vector<int> begin;
  const int layers = blocks - 2;
  for (int stage = 0, layer = 0; stage < stages; ++stage) {
    begin.push_back(stage == 0 ? 0 : std::min(layer + 1, blocks - stages + stage));
    layer += layers / stages + (stage < layers % stages ? 1 : 0);
  }
  return begin;
}

}  // namespace

void Layout::place_stages() {
  const int ranks = options_.grid.sizes().pp, blocks = shape_.num_blocks();
  if (options_.stage_of.empty())
    for (int rank = 0; rank < ranks; ++rank) options_.stage_of.push_back({rank});
  CAPSTAN_CHECK(static_cast<int>(options_.stage_of.size()) == ranks,
                "stages of {} pipeline ranks for {}", options_.stage_of.size(), ranks);
  int stages = 0;
  for (const auto& held : options_.stage_of) stages += static_cast<int>(held.size());
  CAPSTAN_CHECK(stages <= blocks, "{} pipeline stages for {} blocks", stages, blocks);
  std::vector<int>& begin = options_.stage_begin;
  if (begin.empty()) begin = equal_stages(blocks, stages);
  const bool ascending =
      std::adjacent_find(begin.begin(), begin.end(), std::greater_equal<>()) == begin.end();
  CAPSTAN_CHECK(static_cast<int>(begin.size()) == stages && begin.front() == 0 && ascending &&
                    begin.back() < blocks,
                "stage_begin needs {} ascending blocks from 0 to {}", stages, blocks - 1);
}

Layout::Layout(ModelShape shape, std::vector<ParamSpec> table, LayoutOptions options)
    : shape_(std::move(shape)), table_(std::move(table)), options_(std::move(options)) {
  place_stages();
  const int blocks = shape_.num_blocks();
  for (const ParamSpec& spec : table_)
    CAPSTAN_CHECK(spec.block >= 0 && spec.block < blocks, "{}: block {} of a model with {} blocks",
                  spec.name, spec.block, blocks);
}

FlatBuffer Layout::empty_buffer(const ParamSpec& spec) const {
  FlatBuffer buffer;
  buffer.block = spec.block;
  buffer.trainable = spec.trainable;
  buffer.wide = spec.wide;
  buffer.update = spec.update;
  buffer.sum_axes = is_expert(spec) ? kExpertDataAxes : kDenseAxes;
  if (options_.zero_stage > 0)
    buffer.shard_axes =
        is_expert(spec) ? AxisSet(Axis::kEdpShard) : AxisSet(Axis::kDpShard) | Axis::kCp;
  buffer.shards = options_.grid.size_of(buffer.shard_axes);
  // Shards of whole alignment units do not cut blocks of rows, which are as long.
  CAPSTAN_CHECK(buffer.shards == 1 || spec.update != UpdateKind::kMatrix,
                "{}: this layout does not cut whole matrices into shards", spec.name);
  return buffer;
}

std::vector<FlatBuffer> Layout::buffers_of_block(int block, int rank) const {
  const Coord coord = options_.grid.coord(rank);
  const int stages = static_cast<int>(options_.stage_begin.size());
  const int first_rank = options_.pipeline_rank_of(0);
  const bool tied_apart = block == 0 && shape_.tie_word_embeddings &&
                          first_rank != options_.pipeline_rank_of(stages - 1);
  std::vector<FlatBuffer> buffers;
  // What tells buffers of one block apart.
  std::map<std::tuple<bool, UpdateKind, bool, bool>, size_t> place;
  std::vector<int> last_group;  // fuse group that each buffer ended with
  for (const Member& member : members_of_block(table_, block)) {
    const ParamSpec& spec = table_[static_cast<size_t>(member.spec)];
    if (is_expert(spec) && !holds_expert(spec, options_.grid, rank)) continue;
    const auto [it, is_new] = place.try_emplace(
        {is_expert(spec), spec.update, spec.trainable, spec.wide}, buffers.size());
    if (is_new) {
      buffers.push_back(empty_buffer(spec));
      last_group.push_back(-1);
    }
    LocalParam param = is_expert(spec) ? whole_param(spec, member.spec)
                                       : cut_tensor(spec, member.spec, options_, coord.tp);
    if (tied_apart) {
      param.extra_sum = param.extra_sum | Axis::kPp;
      param.counted = param.counted && coord.pp == first_rank;
    }
    append(buffers[it->second], std::move(param), last_group[it->second] != member.group_first);
    last_group[it->second] = member.group_first;
  }
  for (FlatBuffer& buffer : buffers)
    buffer.numel = round_up(buffer.numel, kAlignment * buffer.shards);
  return buffers;
}

RankLayout Layout::rank(int rank) const {
  const int stages = static_cast<int>(options_.stage_begin.size());
  RankLayout layout;
  layout.rank = rank;
  for (const int stage : options_.stage_of.at(static_cast<size_t>(options_.grid.coord(rank).pp))) {
    const auto at = static_cast<size_t>(stage);
    const int end = stage + 1 == stages ? shape_.num_blocks() : options_.stage_begin[at + 1];
    std::vector<int> blocks;
    for (int block = options_.stage_begin[at]; block < end; ++block) blocks.push_back(block);
    layout.blocks.insert(layout.blocks.end(), blocks.begin(), blocks.end());
    layout.chunks.push_back(std::move(blocks));
  }
  std::sort(layout.blocks.begin(), layout.blocks.end());
  std::vector<int> stored = layout.blocks;
  // The last stage keeps its own copy of a tied embedding, laid out as on the first.
  if (shape_.tie_word_embeddings && stored.back() == shape_.head_block() && stored.front() != 0)
    stored.insert(stored.begin(), 0);
  for (const int block : stored)
    for (FlatBuffer& buffer : buffers_of_block(block, rank))
      layout.buffers.push_back(std::move(buffer));
  return layout;
}

}  // namespace capstan::plan
