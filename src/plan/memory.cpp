// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Memory by category, traffic per step and size of a checkpoint. Storage is counted as it is
// allocated: one tensor per flat buffer for values, master and each moment, one per bucket for
// gradients.
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/bytes.h"
#include "plan/resolve_internal.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {
namespace {

int64_t bytes_of(int64_t elements, DType dtype) {
  return allocation_bytes(saturating_multiply(elements, static_cast<int64_t>(size_of(dtype))));
}

// The two blocks that are whole at once where parameters or gradients are sharded: the current one
// and the one that is being gathered or reduced.
int64_t two_largest(const RankLayout& layout, DType dtype) {
  int64_t first = 0, second = 0;
  for (const FlatBuffer& buffer : layout.buffers) {
    const int64_t bytes = bytes_of(buffer.numel, dtype);
    second = std::max(second, std::min(first, bytes));
    first = std::max(first, bytes);
  }
  return first + second;
}

int64_t bucket_numel(const RankLayout& layout, const std::vector<int>& bucket) {
  int64_t elements = 0;
  for (const int i : bucket) elements += layout.buffers[static_cast<size_t>(i)].numel;
  return elements;
}

void add_states(MemoryReport& memory, const Plan& plan, const RankLayout& layout) {
  const int64_t stage = plan.resolved.parallel.zero.stage;
  const PrecisionPlan& precision = plan.precision;
  const bool own_master = precision.compute != precision.master;
  for (const FlatBuffer& buffer : layout.buffers) {
    const int64_t shard = buffer.shard_numel();
    memory.parameters += bytes_of(stage >= 3 ? shard : buffer.numel, precision.compute);
    if (own_master) memory.master += bytes_of(shard, precision.master);
    if (!buffer.trainable) continue;
    if (stage >= 2) memory.gradients += bytes_of(shard, precision.gradients);
    memory.optimizer += 2 * bytes_of(shard, precision.master);
  }
  if (stage >= 3) memory.parameters += two_largest(layout, precision.compute);
  if (stage >= 2) {
    memory.gradients += two_largest(layout, precision.gradients);
    return;
  }
  for (const auto& bucket : make_buckets(layout, precision.gradients, plan.bucket_bytes))
    memory.gradients += bytes_of(bucket_numel(layout, bucket), precision.gradients);
}

// What the sum of a bucket needs besides the bucket: pieces as they arrive from all ranks, and the
// own part of the sum.
int64_t staging_bytes(const Plan& plan, const RankLayout& layout, const std::vector<int>& bucket) {
  constexpr int64_t kPiece = 16 * kMiB;
  const int ranks = plan.grid.size_of(layout.buffers[static_cast<size_t>(bucket.front())].sum_axes);
  if (ranks == 1) return 0;
  const int64_t bytes =
      bucket_numel(layout, bucket) * static_cast<int64_t>(size_of(plan.precision.gradients));
  const int64_t piece = std::min(kPiece, bytes);
  return allocation_bytes(piece) + allocation_bytes(piece / ranks);
}

// One moment of a step.
struct Moment {
  int64_t activations = 0, workspace = 0, communication = 0;
  [[nodiscard]] int64_t total() const { return activations + workspace + communication; }
};

// Follows the last backward of a step: from block to block less is kept, and what earlier blocks
// handed over is being summed. The first backward has more micro-batches in flight and no sums yet.
// The largest moment is the peak.
class PeakSearch {
 public:
  PeakSearch(const Plan& plan, const RankLayout& layout, int pipeline_rank)
      : plan_(plan), layout_(layout), head_(plan.model().shape.head_block()) {
    const ModelShape& shape = plan.model().shape;
    bytes_ = find_family(shape.family).activation_bytes(shape, activation_query(plan));
    in_flight_ = peak_in_flight(plan.schedule, pipeline_rank);
    for (const int block : layout.blocks) {
      if (block == 0) saved_ += bytes_.saved_embedding;
      if (is_layer(block)) saved_ = std::min(saved_ + bytes_.saved_per_layer, kSaturated);
    }
  }

  Moment run() {
    const auto buckets = make_buckets(layout_, plan_.precision.gradients, plan_.bucket_bytes);
    size_t next = 0;  // first bucket that is not complete
    int64_t staging = 0;
    const int64_t earlier = saturating_multiply(saved_, in_flight_ - 1);
    for (auto block = layout_.blocks.rbegin(); block != layout_.blocks.rend(); ++block) {
      visit(*block, earlier, 0);
      visit(*block, 0, staging);
      if (is_layer(*block)) saved_ -= std::min(bytes_.saved_per_layer, saved_);
      for (; next < buckets.size() && is_complete(buckets[next], *block); ++next)
        staging = std::max(staging, staging_bytes(plan_, layout_, buckets[next]));
    }
    visit(-1, 0, staging);
    return peak_;
  }

 private:
  [[nodiscard]] bool is_layer(int block) const { return block > 0 && block < head_; }
  // All blocks from the last down to `block` are through.
  [[nodiscard]] bool is_complete(const std::vector<int>& bucket, int block) const {
    return std::all_of(bucket.begin(), bucket.end(), [&](int i) {
      return layout_.buffers[static_cast<size_t>(i)].block >= block;
    });
  }
  void visit(int block, int64_t earlier, int64_t staging) {
    Moment now{saved_ + earlier, 0, staging};
    if (block == head_) {
      now.activations += bytes_.saved_head;
      now.workspace = bytes_.head_workspace;
    } else if (is_layer(block)) {
      now.workspace = bytes_.layer_workspace;
    }
    if (now.total() > peak_.total()) peak_ = now;
  }

  const Plan& plan_;
  const RankLayout& layout_;
  int head_;
  ActivationBytes bytes_;
  int in_flight_ = 1;
  int64_t saved_ = 0;  // of one micro-batch, by the blocks whose backward is to come
  Moment peak_;
};

// Token ids, targets and positions of all micro-batches of a step, first keys of documents, and the
// table of rotary angles of a row.
int64_t data_bytes(const Plan& plan) {
  const BatchPlan& batch = plan.batch;
  const int64_t tokens = saturating_multiply(batch.micro_samples, batch.sequence_length);
  int64_t per_batch = 3 * bytes_of(tokens, DType::kInt64);
  if (plan.resolved.data.documents == "separate") per_batch += bytes_of(tokens, DType::kInt32);
  const DType angles = plan.precision.compute == DType::kFp64 ? DType::kFp64 : DType::kFp32;
  return saturating_multiply(batch.micro_batches, per_batch) +
         2 * bytes_of(batch.sequence_length * (plan.model().shape.head_dim / 2), angles);
}

}  // namespace

ActivationQuery activation_query(const Plan& plan) {
  ActivationQuery query;
  query.samples = plan.batch.micro_samples;
  query.sequence_length = plan.batch.sequence_length / plan.grid.sizes().cp;
  query.tokens = saturating_multiply(query.samples, query.sequence_length);
  query.compute = plan.precision.compute;
  query.residual = plan.precision.residual;
  query.gradients = plan.precision.gradients;
  query.documents_separate = plan.resolved.data.documents == "separate";
  return query;
}

MemoryReport report_memory(const Plan& plan, int rank) {
  const RankLayout layout = plan.model().layout.rank(rank);
  MemoryReport memory;
  memory.rank = rank;
  add_states(memory, plan, layout);
  const Moment peak = PeakSearch(plan, layout, plan.grid.coord(rank).pp).run();
  memory.activations = peak.activations;
  memory.workspace = peak.workspace;
  memory.communication = peak.communication;
  memory.data = data_bytes(plan);
  if (plan.resolved.checkpoint.asynchronous) {
    // Copies are shared out: each data-parallel rank saves its part of the weights and both
    // moments.
    const int64_t copies = plan.grid.size_of(kDenseAxes);
    memory.checkpoint_snapshot = (layout.numel() + 2 * layout.numel(true)) / copies *
                                 static_cast<int64_t>(size_of(plan.precision.master));
  }
  return memory;
}

Traffic predict_traffic(const Plan& plan, int rank) {
  Traffic traffic;
  const RankLayout layout = plan.model().layout.rank(rank);
  const auto element = static_cast<int64_t>(size_of(plan.precision.gradients));
  for (const std::vector<int>& bucket :
       make_buckets(layout, plan.precision.gradients, plan.bucket_bytes)) {
    const AxisSet axes = layout.buffers[static_cast<size_t>(bucket.front())].sum_axes;
    if (plan.grid.size_of(axes) == 1) continue;
    TrafficEntry& entry = traffic[name_of(axes) + "/all_reduce"];
    entry.calls += 1;
    entry.bytes += bucket_numel(layout, bucket) * element;
  }
  return traffic;
}

int64_t predict_checkpoint_bytes(const Plan& plan) {
  // Weights and two moments, and room for headers, manifest, recipe and tokenizer.
  constexpr int64_t kSlack = 4 * kMiB, kSlackPerRank = 64 * kKiB;
  return 3 * plan.model().parameters * static_cast<int64_t>(size_of(plan.precision.master)) +
         kSlack + kSlackPerRank * plan.grid.size();
}

void check_memory(Draft& draft, const Plan& plan) {
  const int64_t available = plan.topology.memory_bytes;
  if (available <= 0) return;
  const MemoryReport& m = plan.memory;
  const auto all = checked_multiply(m.peak(), std::max(plan.topology.local_size, 1));
  if (all && *all <= available) return;
  draft.refuse(
      {"batch.micro_samples",
       fmt::format("{} ranks here x {} each (parameters {}, master {}, gradients {}, optimizer {}, "
                   "activations {}, "
                   "workspace {}, communication {}, data {})",
                   plan.topology.local_size, format_bytes(m.peak()), format_bytes(m.parameters),
                   format_bytes(m.master), format_bytes(m.gradients), format_bytes(m.optimizer),
                   format_bytes(m.activations), format_bytes(m.workspace),
                   format_bytes(m.communication), format_bytes(m.data)),
       fmt::format("at most {} on this host", format_bytes(available)),
       "training would run out of memory",
       m.activations + m.workspace > m.peak() / 2
           ? "Lower batch.micro_samples or batch.sequence_length, or start fewer ranks"
           : "Make the model smaller, or start fewer ranks"});
}

}  // namespace capstan::plan
