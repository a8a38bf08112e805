// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What one rank sends in a training step: transfers between stages, gradient sums and gathers of
// weights. What blocks exchange among themselves is in traffic_blocks.cpp.
#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "capstan/plan/passes.h"
#include "plan/traffic_internal.h"

namespace capstan::plan {
namespace {

int64_t bytes_of(int64_t elements, DType dtype) {
  return saturating_multiply(elements, static_cast<int64_t>(size_of(dtype)));
}

// Parameters of some buffers that are summed over tensor ranks first: elements by the size of the
// groups that hold the same part. One sum per size.
std::map<int, int64_t> partial_sums(const RankLayout& layout, const std::vector<int>& buffers) {
  std::map<int, int64_t> elements;
  for (const int b : buffers)
    for (const LocalParam& param : layout.buffers[static_cast<size_t>(b)].params)
      if (param.extra_sum.has(Axis::kTp)) elements[param.holders] += param.numel();
  return elements;
}

bool is_tied_apart(const FlatBuffer& buffer) {
  return std::any_of(buffer.params.begin(), buffer.params.end(),
                     [](const LocalParam& param) { return param.extra_sum.has(Axis::kPp); });
}

// How often the gradient of each buffer is summed in a step.
std::vector<int64_t> sums_of_buffers(const TrafficCount& count) {
  const bool tied = count.plan.model().shape.tie_word_embeddings;
  const auto when = count.plan.resolved.parallel.zero.reduce == "micro_batch"
                        ? ReduceWhen::kMicroBatch
                        : ReduceWhen::kStep;
  std::vector<int64_t> sums(count.layout.buffers.size(), 0);
  for (const GradientPass& pass :
       list_passes(count.plan.schedule, count.pipeline_rank, count.layout, tied, when))
    for (const int buffer : pass.complete) ++sums[static_cast<size_t>(buffer)];
  return sums;
}

// Values of one buffer at stage 3, as the engine opens, prefetches and closes them.
struct Gathered {
  bool is_whole = false;
  int64_t gathers = 0;
  void gather() {
    if (!is_whole) ++gathers;
    is_whole = true;
  }
};

class GatherCount {
 public:
  explicit GatherCount(const TrafficCount& count)
      : layout_(count.layout),
        prefetch_(count.plan.resolved.parallel.zero.prefetch),
        keeps_(!count.plan.resolved.parallel.zero.reshard_after_forward),
        buffers_(count.layout.buffers.size()),
        of_block_(static_cast<size_t>(count.plan.model().shape.num_blocks())) {
    for (size_t b = 0; b < buffers_.size(); ++b)
      of_block_[static_cast<size_t>(layout_.buffers[b].block)].push_back(b);
    const bool holds_head = layout_.blocks.back() == count.plan.model().shape.head_block();
    if (!count.plan.model().shape.tie_word_embeddings || !holds_head) return;
    const std::vector<size_t> embedding = of_block_.front();  // the head reads its table
    of_block_.back().insert(of_block_.back().end(), embedding.begin(), embedding.end());
  }

  void run(const Instruction& work) {
    const std::vector<int>& blocks = layout_.chunks.at(static_cast<size_t>(work.chunk));
    if (work.op == Op::kForward)
      for (size_t i = 0; i < blocks.size(); ++i) {
        open(blocks[i]);
        prefetch(blocks, i, +1);
        close(blocks[i]);
      }
    if (work.op != Op::kBackward && work.op != Op::kBackwardInput) return;
    for (size_t i = blocks.size(); i-- > 0;) {
      if (blocks[i] > 0) open(blocks[i]);  // the embedding's backward reads no weights
      if (blocks[i] > 0) close(blocks[i]);
      prefetch(blocks, i, -1);
    }
  }
  [[nodiscard]] int64_t gathers(size_t buffer) const { return buffers_[buffer].gathers; }

 private:
  void open(int block) {
    for (const size_t b : of_block_[static_cast<size_t>(block)]) buffers_[b].gather();
  }
  void close(int block) {
    if (keeps_) return;
    for (const size_t b : of_block_[static_cast<size_t>(block)]) buffers_[b].is_whole = false;
  }
  void prefetch(const std::vector<int>& blocks, size_t position, int direction) {
    for (int64_t ahead = 1; ahead <= prefetch_; ++ahead) {
      const int64_t next = static_cast<int64_t>(position) + direction * ahead;
      if (next < 0 || next >= static_cast<int64_t>(blocks.size())) return;
      const int block = blocks[static_cast<size_t>(next)];
      if (direction < 0 && block == 0) return;
      open(block);
    }
  }

  const RankLayout& layout_;
  int64_t prefetch_;
  bool keeps_;
  std::vector<Gathered> buffers_;
  std::vector<std::vector<size_t>> of_block_;
};

}  // namespace

void count_transfers(TrafficCount& count) {
  const Plan& plan = count.plan;
  const Grid::Sizes& sizes = plan.grid.sizes();
  const int64_t parts = int64_t{sizes.cp} * (plan.resolved.parallel.sequence ? sizes.tp : 1);
  const int64_t tokens =
      saturating_multiply(plan.batch.micro_samples, plan.batch.sequence_length / parts);
  const int64_t bytes = bytes_of(saturating_multiply(tokens, plan.model().shape.hidden_size),
                                 plan.precision.residual);
  for (const Instruction& i : plan.schedule.ranks[static_cast<size_t>(count.pipeline_rank)]) {
    if (is_send(i.op)) count.add(Axis::kPp, "send", 1, bytes);
    if (is_receive(i.op)) count.add(Axis::kPp, "recv", 1, bytes);
  }
}

void count_sums(TrafficCount& count) {
  const DType type = count.plan.precision.gradients, reduction = count.plan.precision.reduction;
  const bool shards = count.plan.model().layout.options().zero_stage > 0;
  const std::vector<int64_t> sums = shards ? sums_of_buffers(count) : std::vector<int64_t>{};
  for (const auto& bucket : make_buckets(count.layout, type, count.plan.bucket_bytes)) {
    const FlatBuffer& first = count.layout.buffers[static_cast<size_t>(bucket.front())];
    const int64_t times = shards ? sums[static_cast<size_t>(bucket.front())] : 1;
    for (const auto& [holders, elements] : partial_sums(count.layout, bucket))
      count.add(Axis::kTp, "all_reduce", times, bytes_of(elements, type));
    int64_t elements = 0;
    for (const int b : bucket) {
      const FlatBuffer& buffer = count.layout.buffers[static_cast<size_t>(b)];
      elements += buffer.numel;
      if (is_tied_apart(buffer))
        count.add(Axis::kPp, "all_reduce", 1, bytes_of(buffer.shard_numel(), reduction));
    }
    const AxisSet axes = shards ? first.shard_axes : first.sum_axes;
    count.add(axes, shards ? "reduce_scatter" : "all_reduce", times, bytes_of(elements, reduction));
    if (shards)
      count.add(first.replica_axes(), "all_reduce", 1, bytes_of(first.shard_numel(), reduction));
  }
}

void count_gathers(TrafficCount& count) {
  const int stage = count.plan.model().layout.options().zero_stage;
  if (stage == 0) return;
  GatherCount gathered(count);
  if (stage == 3)
    for (const Instruction& work :
         count.plan.schedule.ranks[static_cast<size_t>(count.pipeline_rank)])
      gathered.run(work);
  for (size_t b = 0; b < count.layout.buffers.size(); ++b) {
    const FlatBuffer& buffer = count.layout.buffers[b];
    // Below stage 3 once, when the update is published.
    const int64_t times = stage == 3 ? gathered.gathers(b) : (buffer.trainable ? 1 : 0);
    count.add(buffer.shard_axes, "all_gather", times,
              bytes_of(buffer.shard_numel(), value_dtype(count.plan.precision, buffer)));
  }
}

Traffic predict_traffic(const Plan& plan, int rank) {
  const RankLayout layout = plan.model().layout.rank(rank);
  TrafficCount count{plan, layout, plan.grid.coord(rank).pp};
  count_transfers(count);
  count_blocks(count);
  count_sums(count);
  count_gathers(count);
  return std::move(count.traffic);
}

}  // namespace capstan::plan
