// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Who holds which part of which parameter, as boxes in global coordinates, and how parameters lie
// in flat buffers. Everything that stores, reduces, saves or loads parameters reads this; nothing
// derives it again. Pure data.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "capstan/base/dtype.h"
#include "capstan/plan/family.h"
#include "capstan/plan/grid.h"

namespace capstan::plan {

// A box in the coordinates of a global tensor: [begin, begin + extent) per dimension.
struct Box {
  std::vector<int64_t> begin, extent;
  [[nodiscard]] int64_t numel() const;
  bool operator==(const Box&) const = default;
};
[[nodiscard]] Box whole_box(const Shape& shape);
[[nodiscard]] Box intersect(const Box& a, const Box& b);  // numel() == 0 when they do not meet

// Boxes of one tensor, in the order in which their elements follow one another in memory.
using Region = std::vector<Box>;
[[nodiscard]] int64_t numel(const Region& region);

// One parameter as a rank of the tensor axis holds it, before any data-parallel sharding.
struct LocalParam {
  int spec = 0;       // index into ModelPlan::table
  Shape local_shape;  // padding included
  Box real;  // the real part, in global coordinates; real.extent <= local_shape, padding at the end
  int64_t flat_begin = 0;  // first element in its flat buffer
  AxisSet
      extra_sum;  // axes to sum the gradient over besides the buffer's data axes (tp under SP, ...)
  bool counted =
      true;  // of all holders over tp (and pp, when tied) exactly one counts the element in norms
  // Consecutive ranks of the tensor axis that hold this same part; a sum over tp in extra_sum means
  // over these. A sum over pp means over the first and the last stage (tied embedding).
  int holders = 1;
  [[nodiscard]] int64_t numel() const { return plan::numel(local_shape); }
};

// One flat buffer: parameters of one block with the same reduce group, storage dtype, trainable
// flag and update kind. Elements between parameters and at the end are padding and stay zero.
struct FlatBuffer {
  int block = 0;
  bool trainable = true;
  bool wide = false;  // values in the master's type instead of the compute type
  UpdateKind update = UpdateKind::kElementwise;
  AxisSet sum_axes;    // gradient-sum group shared by all its parameters (dense:
                       // dp_replicate|dp_shard|cp; experts: dp_replicate|edp_shard)
  AxisSet shard_axes;  // ZeRO cuts over these (dp_shard|cp; edp_shard); empty at stage 0
  std::vector<LocalParam> params;  // fuse groups side by side, each group aligned to 256 elements
  int64_t numel = 0;               // multiple of 256 x number of shards
  int shards = 1;
  [[nodiscard]] int64_t shard_numel() const { return numel / shards; }
  // Ranks along these hold the same shard.
  [[nodiscard]] AxisSet replica_axes() const { return sum_axes.without(shard_axes); }
};

struct RankLayout {
  int rank = 0;
  std::vector<FlatBuffer> buffers;       // in block order
  std::vector<int> blocks;               // blocks this rank computes, ascending
  std::vector<std::vector<int>> chunks;  // the same by chunk, each a run of consecutive blocks
  [[nodiscard]] int64_t numel(
      bool trainable_only = false) const;  // over all buffers, padding included
};

// Gradient buckets in the order in which their reductions are issued: indices into
// RankLayout::buffers. Trainable buffers in backward order (head first, a tied embedding last),
// packed up to bucket_bytes; a buffer is never cut, and a bucket holds one sum group. With ZeRO
// every buffer is a bucket of its own. Equal on all ranks that reduce together.
[[nodiscard]] std::vector<std::vector<int>> make_buckets(const RankLayout& layout, DType gradients,
                                                         int64_t bucket_bytes);

// Gradient memory where the optimizer runs in the backward: all blocks use the same elements in
// turn. A tied table, which the head writes to first and the embedding last, has its own. ZeRO
// stages 2 and 3 keep shards.
struct SharedGradients {
  std::vector<int64_t> begin;  // first element of each buffer; frozen ones have none
  int64_t numel = 0;
};
[[nodiscard]] SharedGradients share_gradients(const RankLayout& layout, bool tied, int zero_stage);

// Calls visit(global index, local index in the parameter, count) for each contiguous run of real
// elements in the local range [begin, end) of a parameter with global shape `global`.
void for_each_run(const LocalParam& param, const Shape& global, int64_t begin, int64_t end,
                  const std::function<void(int64_t, int64_t, int64_t)>& visit);

// The real elements of the flat range [begin, end) of a buffer: for each parameter it touches, the
// boxes in global coordinates and where their elements lie (element offset from `begin`).
// Checkpoints save and load by this.
struct FlatPiece {
  int param = 0;       // index into FlatBuffer::params
  Box box;             // global coordinates; its elements are contiguous in memory
  int64_t offset = 0;  // from `begin`
};
[[nodiscard]] std::vector<FlatPiece> pieces_of(const FlatBuffer& buffer,
                                               const std::vector<ParamSpec>& table, int64_t begin,
                                               int64_t end);

struct LayoutOptions {
  Grid grid;
  int zero_stage = 0;
  bool sequence_parallel = false;
  int64_t vocab_multiple = 64;  // local vocabulary rows are padded to it when tp > 1
  // First block of each pipeline stage; empty = layers in equal parts, earlier stages taking what
  // is left over.
  std::vector<int> stage_begin;
  // Schedule::stage_of: [pipeline rank][chunk] -> stage; empty = stage r on rank r.
  std::vector<std::vector<int>> stage_of;
  [[nodiscard]] int pipeline_rank_of(int stage) const;
};

// Computes a rank's layout on demand; equal on every rank for equal arguments.
class Layout {
 public:
  Layout() = default;
  Layout(ModelShape shape, std::vector<ParamSpec> table, LayoutOptions options);
  [[nodiscard]] RankLayout rank(int rank) const;
  [[nodiscard]] const std::vector<ParamSpec>& table() const { return table_; }
  [[nodiscard]] const LayoutOptions& options() const { return options_; }

 private:
  [[nodiscard]] std::vector<FlatBuffer> buffers_of_block(int block, int rank) const;
  [[nodiscard]] FlatBuffer empty_buffer(const ParamSpec& spec) const;
  void place_stages();
  ModelShape shape_;
  std::vector<ParamSpec> table_;
  LayoutOptions options_;
};

}  // namespace capstan::plan
