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

LocalParam make_local(const std::vector<ParamSpec>& table, int index, const LayoutOptions& options,
                      const Coord& coord) {
  const ParamSpec& spec = table.at(static_cast<size_t>(index));
  const int tp = options.grid.sizes().tp;
  LocalParam param;
  param.spec = index;
  param.local_shape = spec.shape;
  param.real = whole_box(spec.shape);
  if (spec.tensor.kind == ShardRule::Kind::kReplicate) {
    param.holders = tp;
  } else {
    const bool vocabulary = spec.tensor.kind == ShardRule::Kind::kVocab;
    const auto dim = static_cast<size_t>(vocabulary ? 0 : spec.tensor.dim);
    const Cut cut = vocabulary ? cut_vocabulary(spec, tp, coord.tp, options.vocab_multiple)
                               : cut_split(spec, spec.tensor, tp, coord.tp);
    param.local_shape[dim] = cut.local;
    param.real.begin[dim] = cut.begin;
    param.real.extent[dim] = cut.extent;
    param.holders = cut.holders;
  }
  param.counted = coord.tp % param.holders == 0;
  // A copy on the residual stream sees whole tensors, so its gradient is already complete, unless
  // the stream itself is cut along the sequence.
  const bool partial = spec.site == Site::kSplit || options.sequence_parallel;
  if (param.holders > 1 && partial) param.extra_sum = Axis::kTp;
  return param;
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

bool is_expert(const ParamSpec& spec) { return spec.expert.kind != ShardRule::Kind::kReplicate; }

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

Layout::Layout(ModelShape shape, std::vector<ParamSpec> table, LayoutOptions options)
    : shape_(std::move(shape)), table_(std::move(table)), options_(std::move(options)) {
  const int stages = options_.grid.sizes().pp, blocks = shape_.num_blocks();
  CAPSTAN_CHECK(stages <= blocks, "{} pipeline stages for {} blocks", stages, blocks);
  std::vector<int>& begin = options_.stage_begin;
  if (begin.empty()) {
    // Layers in equal parts; the embedding goes with the first, the head with the last.
    const int layers = blocks - 2;
    for (int stage = 0, layer = 0; stage < stages; ++stage) {
      begin.push_back(stage == 0 ? 0 : std::min(layer + 1, blocks - stages + stage));
      layer += layers / stages + (stage < layers % stages ? 1 : 0);
    }
  }
  const bool ascending =
      std::adjacent_find(begin.begin(), begin.end(), std::greater_equal<>()) == begin.end();
  CAPSTAN_CHECK(static_cast<int>(begin.size()) == stages && begin.front() == 0 && ascending &&
                    begin.back() < blocks,
                "stage_begin needs {} ascending blocks from 0 to {}", stages, blocks - 1);
  for (const ParamSpec& spec : table_)
    CAPSTAN_CHECK(spec.block >= 0 && spec.block < blocks, "{}: block {} of a model with {} blocks",
                  spec.name, spec.block, blocks);
}

std::vector<FlatBuffer> Layout::buffers_of_block(int block, const Coord& coord) const {
  const Grid::Sizes& sizes = options_.grid.sizes();
  const bool frozen = std::find(options_.frozen_blocks.begin(), options_.frozen_blocks.end(),
                                block) != options_.frozen_blocks.end();
  const bool tied_apart = block == 0 && shape_.tie_word_embeddings && sizes.pp > 1;
  std::vector<FlatBuffer> buffers;
  std::map<std::tuple<bool, UpdateKind>, size_t> place;  // what tells buffers of one block apart
  std::vector<int> last_group;                           // fuse group that each buffer ended with
  for (const Member& member : members_of_block(table_, block)) {
    const ParamSpec& spec = table_[static_cast<size_t>(member.spec)];
    CAPSTAN_CHECK(!is_expert(spec) || sizes.ep == 1, "{}: experts are not cut by this layout",
                  spec.name);
    const auto [it, is_new] = place.try_emplace({is_expert(spec), spec.update}, buffers.size());
    if (is_new) {
      FlatBuffer buffer;
      buffer.block = block;
      buffer.trainable = !frozen;
      buffer.update = spec.update;
      buffer.sum_axes = kDenseAxes;
      buffer.shard_axes = AxisSet(Axis::kDpShard) | Axis::kCp;
      buffer.shards = options_.zero_stage > 0 ? options_.grid.size_of(buffer.shard_axes) : 1;
      CAPSTAN_CHECK(buffer.shards == 1 || spec.update == UpdateKind::kElementwise,
                    "{}: only elementwise buffers are cut into shards by this layout", spec.name);
      buffers.push_back(std::move(buffer));
      last_group.push_back(-1);
    }
    LocalParam param = make_local(table_, member.spec, options_, coord);
    if (tied_apart) {
      param.extra_sum = param.extra_sum | Axis::kPp;
      param.counted = param.counted && coord.pp == 0;
    }
    append(buffers[it->second], std::move(param), last_group[it->second] != member.group_first);
    last_group[it->second] = member.group_first;
  }
  for (FlatBuffer& buffer : buffers)
    buffer.numel = round_up(buffer.numel, kAlignment * buffer.shards);
  return buffers;
}

RankLayout Layout::rank(int rank) const {
  const Coord coord = options_.grid.coord(rank);
  const auto stage = static_cast<size_t>(coord.pp);
  const bool is_last = stage + 1 == options_.stage_begin.size();
  const int begin = options_.stage_begin[stage];
  const int end = is_last ? shape_.num_blocks() : options_.stage_begin[stage + 1];
  RankLayout layout;
  layout.rank = rank;
  const auto add_buffers = [&](int block) {
    for (FlatBuffer& buffer : buffers_of_block(block, coord))
      layout.buffers.push_back(std::move(buffer));
  };
  // The last stage keeps its own copy of a tied embedding, laid out as on the first.
  if (shape_.tie_word_embeddings && is_last && begin > 0) add_buffers(0);
  for (int block = begin; block < end; ++block) {
    layout.blocks.push_back(block);
    add_buffers(block);
  }
  return layout;
}

}  // namespace capstan::plan
