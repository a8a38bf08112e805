// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Follows the instruction list of a rank as the engine runs it, adds and takes off what each block
// keeps, gathers and collects, and finds the largest moment.
#include <algorithm>
#include <limits>
#include <utility>

#include "capstan/base/bytes.h"
#include "capstan/plan/fp8.h"
#include "capstan/plan/passes.h"
#include "plan/memory_internal.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

// What the sum of a bucket over processes needs besides the bucket: pieces as they arrive from all
// ranks, and the own part of the sum.
int64_t staging_bytes(int64_t bytes, int ranks) {
  constexpr int64_t kPiece = 16 * kMiB;
  if (ranks == 1) return 0;
  const int64_t piece = std::min(kPiece, bytes);
  return allocation_bytes(piece) + allocation_bytes(piece / ranks);
}

class StepWalk {
 public:
  StepWalk(const Plan& plan, const RankLayout& layout, int pipeline_rank)
      : plan_(plan),
        layout_(layout),
        pipeline_rank_(pipeline_rank),
        head_(plan.model().shape.head_block()),
        stage_(plan.model().layout.options().zero_stage),
        zero_(plan.resolved.parallel.zero),
        again_(plan.resolved.parallel.recompute.mode == "block"),
        offloads_(plan.resolved.parallel.offload_activations),
        travels_(offloads_ && is_on_gpu(plan)),
        bytes_(activation_bytes_of(plan)),
        passes_(list_passes(
            plan.schedule, pipeline_rank, layout, plan.model().shape.tie_word_embeddings,
            zero_.reduce == "micro_batch" ? ReduceWhen::kMicroBatch : ReduceWhen::kStep)),
        buffers_(layout.buffers.size()),
        of_block_(static_cast<size_t>(head_) + 1) {
    const Grid::Sizes& g = plan.grid.sizes();
    const bool cuts = plan.resolved.parallel.sequence;
    const int64_t tokens =
        saturating_multiply(plan.batch.micro_samples, plan.batch.sequence_length / g.cp);
    const int64_t hidden = plan.model().shape.hidden_size;
    const int64_t kept = saturating_multiply(cuts ? tokens / g.tp : tokens, hidden);
    boundary_ = stored(kept, plan.precision.residual);
    layer_output_ = stored(kept, plan.precision.compute);
    if (cuts) {
      gathered_input_ = stored(saturating_multiply(tokens, hidden), plan.precision.compute);
      gathered_residual_ = stored(saturating_multiply(tokens, hidden), plan.precision.residual);
    }
    for (const ParamSpec& spec : plan.model().table())
      if (spec.trainable) first_learning_ = std::min(first_learning_, spec.block);
    list_buffers();
  }

  StepMoment run() {
    const auto& list = plan_.schedule.ranks[static_cast<size_t>(pipeline_rank_)];
    for (const Instruction& i : list) execute(i);
    visit(0);
    peak_.host = most_hosted_;
    return peak_;
  }

 private:
  [[nodiscard]] int64_t stored(int64_t elements, DType dtype) const {
    return stored_bytes(elements, dtype, is_on_gpu(plan_));
  }

  struct Buffer {
    int64_t values = 0, gradients = 0;  // bytes of the whole
    int64_t shard = 0;                  // bytes of a gradient shard
    int64_t staging = 0;
    int64_t rounded = 0;  // its bucket as it travels and as it arrives, in the reduction's dtype
    bool is_whole = false, collects = false, has_sum = false;
  };

  void list_buffers() {
    for (size_t b = 0; b < buffers_.size(); ++b) {
      const FlatBuffer& from = layout_.buffers[b];
      Buffer& buffer = buffers_[b];
      buffer.values = stored(from.numel, value_dtype(plan_.precision, from));
      buffer.gradients = stored(from.numel, plan_.precision.gradients);
      buffer.shard = stored(from.shard_numel(), plan_.precision.gradients);
      of_block_[static_cast<size_t>(from.block)].push_back(b);
    }
    const DType reduction = plan_.precision.reduction;
    const auto element = static_cast<int64_t>(size_of(reduction));
    for (const auto& bucket :
         make_buckets(layout_, plan_.precision.gradients, plan_.bucket_bytes)) {
      const FlatBuffer& first = layout_.buffers[static_cast<size_t>(bucket.front())];
      int64_t elements = 0;
      for (const int b : bucket) elements += layout_.buffers[static_cast<size_t>(b)].numel;
      // A bucket is summed when the last of its buffers is complete, which is the last one listed.
      Buffer& last = buffers_[static_cast<size_t>(bucket.back())];
      const int ranks = plan_.grid.size_of(stage_ > 0 ? first.shard_axes : first.sum_axes);
      if (!is_on_gpu(plan_))
        last.staging = staging_bytes(saturating_multiply(elements, element), ranks);
      if (ranks > 1 && reduction != plan_.precision.gradients)
        last.rounded =
            stored(elements, reduction) + (stage_ > 0 ? stored(first.shard_numel(), reduction) : 0);
    }
    const bool tied = plan_.model().shape.tie_word_embeddings;
    if (!tied || layout_.blocks.back() != head_) return;
    const std::vector<size_t> embedding = of_block_.front();  // the head uses its table
    of_block_.back().insert(of_block_.back().end(), embedding.begin(), embedding.end());
  }

  void execute(const Instruction& i) {
    switch (i.op) {
      case Op::kForward:
        return forward(i.chunk);
      case Op::kBackward:
        return backward(i.chunk, false);
      case Op::kBackwardInput:
        return backward(i.chunk, true);
      case Op::kBackwardWeight:
        return backward_weights(i.chunk);
      case Op::kReceiveActivation:
      case Op::kReceiveGradient:
        saved_ += boundary_;
        return visit(0);
      case Op::kSendGradient:
      case Op::kSendActivation:  // the buffer is let go at the next send, received by then
        saved_ -= std::exchange(sent_, boundary_);
        return visit(0);
      case Op::kReduce:
      case Op::kStep:
        return;
    }
  }

  [[nodiscard]] bool is_layer(int block) const { return block > 0 && block < head_; }
  [[nodiscard]] int stage_of(int chunk) const {
    return plan_.schedule.stage_of[static_cast<size_t>(pipeline_rank_)][static_cast<size_t>(chunk)];
  }
  [[nodiscard]] bool is_remote(int stage) const {
    return plan_.schedule.rank_of[static_cast<size_t>(stage)] != pipeline_rank_;
  }

  // Neither it nor anything before it in its stage learns: it runs without a graph and
  // leaves nothing.
  [[nodiscard]] bool is_idle(int chunk, int block) const {
    return !again_ && stage_of(chunk) == 0 && is_layer(block) && block < first_learning_;
  }

  // The input of a layer that is run again.
  [[nodiscard]] int64_t input_of(int chunk, int block) const {
    if (block == layout_.chunks[static_cast<size_t>(chunk)].front() || block == 1) return boundary_;
    return bytes_.block_input;
  }

  // What a block keeps from its forward to its backward. A layer that is run again keeps its input,
  // counted by the block that made it, or by the layer where another stage did.
  [[nodiscard]] int64_t kept_by(int chunk, int block) const {
    const auto& blocks = layout_.chunks[static_cast<size_t>(chunk)];
    if (block == head_) return bytes_.saved_head;
    if (is_idle(chunk, block)) return 0;
    if (!again_) return block == 0 ? bytes_.saved_embedding : bytes_.saved_per_layer;
    const bool is_input_of_layer = block != blocks.back() && is_layer(block + 1);
    int64_t kept = 0;
    if (is_input_of_layer) kept = block == 0 ? boundary_ : bytes_.block_input;
    if (is_layer(block) && block == blocks.front() && stage_of(chunk) > 0) kept += boundary_;
    return kept;
  }

  void gather(int block) {
    if (stage_ < 3) return;
    for (const size_t b : of_block_[static_cast<size_t>(block)]) {
      if (!buffers_[b].is_whole) values_ += buffers_[b].values;
      buffers_[b].is_whole = true;
    }
  }
  void close(int block) {
    if (stage_ < 3 || !zero_.reshard_after_forward) return;
    for (const size_t b : of_block_[static_cast<size_t>(block)]) {
      if (buffers_[b].is_whole) values_ -= buffers_[b].values;
      buffers_[b].is_whole = false;
    }
  }
  void prefetch(const std::vector<int>& blocks, size_t position, int direction) {
    if (stage_ < 3) return;
    for (int64_t ahead = 1; ahead <= zero_.prefetch; ++ahead) {
      const int64_t next = static_cast<int64_t>(position) + direction * ahead;
      if (next < 0 || next >= static_cast<int64_t>(blocks.size())) return;
      if (direction < 0 && blocks[static_cast<size_t>(next)] == 0) return;
      gather(blocks[static_cast<size_t>(next)]);
      if (zero_.offload == "all") come_back(blocks[static_cast<size_t>(next)]);
    }
  }
  // The shards of an offloaded block on the device, until they have been gathered.
  void come_back(int block) {
    for (const size_t b : of_block_[static_cast<size_t>(block)]) {
      const FlatBuffer& buffer = layout_.buffers[b];
      arriving_ += stored(buffer.shard_numel(), value_dtype(plan_.precision, buffer));
    }
  }
  // Gradients of a block are made: stages 2 and 3 collect them in memory of their own.
  void collect(int block) {
    if (stage_ < 2) return;
    for (const size_t b : of_block_[static_cast<size_t>(block)]) {
      Buffer& buffer = buffers_[b];
      if (!layout_.buffers[b].trainable || buffer.collects) continue;
      buffer.collects = true;
      gradients_ += buffer.gradients;
    }
  }

  void forward(int chunk) {
    const auto& blocks = layout_.chunks[static_cast<size_t>(chunk)];
    const int stage = stage_of(chunk);
    if (stage > 0) saved_ -= boundary_;  // counted by the first block
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int block = blocks[i];
      arriving_ = 0;
      gather(block);
      prefetch(blocks, i, +1);
      kept_in(block) += kept_by(chunk, block);
      if (block == head_) collect(block);  // the head makes its gradients at once
      visit(forward_workspace(block) + leaving_ + travelling(chunk, block));
      if (travels_ && is_layer(block)) leaving_ = travelling(chunk, block);
      close(block);
    }
    if (stage + 1 < plan_.schedule.stages) saved_ += boundary_;  // to be sent or handed over
  }

  // Where what a block keeps is counted: on a GPU offloaded activations leave it.
  [[nodiscard]] int64_t& kept_in(int block) {
    return travels_ && (again_ ? block != head_ : is_layer(block)) ? hosted_ : saved_;
  }
  // What a layer sends to the host, and has on the device while it runs and the next one does; in
  // the backward its own and that of the layer before are here.
  [[nodiscard]] int64_t travelling(int chunk, int block) const {
    if (!travels_ || !is_layer(block)) return 0;
    return again_ ? input_of(chunk, block) : kept_by(chunk, block);
  }

  // Offloaded activations are here twice while their block runs on a CPU rank, where both are host
  // memory.
  [[nodiscard]] int64_t forward_workspace(int block) const {
    // Both streams that the last norm adds; the residual is saved where layers keep theirs.
    if (block == head_) return bytes_.head_workspace + layer_output_ + (again_ ? boundary_ : 0);
    return offloads_ && !travels_ && is_layer(block) ? bytes_.saved_per_layer : 0;
  }

  void backward(int chunk, bool defer_weights) {
    const auto& blocks = layout_.chunks[static_cast<size_t>(chunk)];
    const int stage = stage_of(chunk);
    if (stage + 1 < plan_.schedule.stages) saved_ -= boundary_;  // counted as workspace
    leaving_ = 0;
    for (size_t i = blocks.size(); i-- > 0;) {
      const int block = blocks[i];
      arriving_ = 0;
      if (block > 0) gather(block);
      if (!defer_weights) collect(block);
      const int64_t kept = kept_by(chunk, block);
      const int64_t back =
          (again_ ? 0 : travelling(chunk, block)) + (i > 0 ? travelling(chunk, blocks[i - 1]) : 0);
      if (is_layer(block) && !is_idle(chunk, block))
        visit_layer(travels_ ? 0 : kept, again_ && !travels_ ? input_of(chunk, block) : 0,
                    back + (defer_weights ? bytes_.split_layer_workspace : bytes_.layer_workspace));
      if (block == 0) visit(boundary_ + gathered_residual_);
      kept_in(block) -= kept;
      if (defer_weights) saved_ += put_off(chunk, block);
      if (block > 0) close(block);
      prefetch(blocks, i, -1);
      if (!defer_weights) pass_done();
    }
    if (stage > 0) saved_ += boundary_;  // the gradient of its input
  }

  void visit_layer(int64_t kept, int64_t input, int64_t workspace) {
    const int64_t before = saved_;
    if (again_) saved_ += bytes_.saved_per_layer - kept - input;  // the input is let go by then
    visit(workspace);
    saved_ = before;
  }

  // Held by the weight half of a backward.
  [[nodiscard]] int64_t put_off(int chunk, int block) const {
    if (is_idle(chunk, block)) return 0;
    if (is_layer(block)) return bytes_.weight_work;
    return block == 0 ? std::max(boundary_, gathered_residual_) : 0;
  }

  void backward_weights(int chunk) {
    const auto& blocks = layout_.chunks[static_cast<size_t>(chunk)];
    for (const int block : blocks) collect(block);
    visit(gathered_input_ + fp8_work_bytes(plan_));
    for (const int block : blocks) saved_ -= put_off(chunk, block);
    for (size_t i = 0; i < blocks.size(); ++i) pass_done();
  }

  // One whole gradient may wait for its sum while the next one is collected.
  void pass_done() {
    const GradientPass& pass = passes_.at(next_pass_++);
    for (const int b : pass.complete) {
      Buffer& buffer = buffers_[static_cast<size_t>(b)];
      staging_ = std::max(staging_, buffer.staging);
      if (stage_ >= 2) collect(layout_.buffers[static_cast<size_t>(b)].block);
      if (buffer.rounded > 0)
        sum_rounded(buffer);
      else if (stage_ >= 2)
        sum_as_is(buffer);
    }
  }
  void sum_as_is(Buffer& buffer) {
    const int64_t target = std::exchange(buffer.has_sum, true) ? buffer.shard : 0;
    gradients_ += target;
    visit(0);
    buffer.collects = false;
    let_go(buffer.gradients + target);
  }
  // What is rounded travels on its own: the gradient behind it is free at once.
  void sum_rounded(Buffer& buffer) {
    gradients_ += buffer.rounded;
    visit(0);
    if (std::exchange(buffer.collects, false)) gradients_ -= buffer.gradients;
    let_go(buffer.rounded);
  }
  // Behind the sum of the next one.
  void let_go(int64_t bytes) { gradients_ -= std::exchange(pending_, bytes); }

  void visit(int64_t workspace) {
    most_hosted_ = std::max(most_hosted_, hosted_);
    const StepMoment now{.activations = std::min(saved_, kSaturated),
                         .workspace = workspace,
                         .communication = staging_,
                         .values = values_ + arriving_,
                         .gradients = gradients_};
    if (now.total() > peak_.total()) peak_ = now;
  }

  const Plan& plan_;
  const RankLayout& layout_;
  int pipeline_rank_, head_, stage_;
  int first_learning_ = std::numeric_limits<int>::max();  // block
  const recipe::Zero& zero_;
  bool again_, offloads_, travels_;
  ActivationBytes bytes_;
  std::vector<GradientPass> passes_;
  std::vector<Buffer> buffers_;
  std::vector<std::vector<size_t>> of_block_;
  int64_t boundary_ = 0, layer_output_ = 0;             // between stages; between layers
  int64_t gathered_input_ = 0, gathered_residual_ = 0;  // 0 unless rows are cut
  int64_t sent_ = 0;                                    // by the last send
  int64_t saved_ = 0, values_ = 0, gradients_ = 0;      // now
  int64_t staging_ = 0, pending_ = 0, arriving_ = 0;
  int64_t hosted_ = 0, most_hosted_ = 0, leaving_ = 0;  // offloaded; on its way
  size_t next_pass_ = 0;
  StepMoment peak_;
};

}  // namespace

StepMoment find_peak(const Plan& plan, const RankLayout& layout, int pipeline_rank) {
  return StepWalk(plan, layout, pipeline_rank).run();
}

}  // namespace capstan::plan
