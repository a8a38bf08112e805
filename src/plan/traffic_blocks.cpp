// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the blocks of a rank exchange over the tensor, context and expert axes. The table is meant
// to be read beside the seams in parallel: a collective there is a line here. Tokens: those of one
// micro-batch in this rank's context part.
#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "capstan/base/bytes.h"
#include "plan/traffic_internal.h"

namespace capstan::plan {
namespace {

// What one micro-batch of a block does, and how often.
struct Runs {
  int64_t forwards = 0, backwards = 0;
  bool trains = true;  // weight gradients are made
};

class BlockCount {
 public:
  explicit BlockCount(TrafficCount& count)
      : count_(count),
        plan_(count.plan),
        shape_(plan_.model().shape),
        sizes_(plan_.grid.sizes()),
        sequence_(plan_.resolved.parallel.sequence),
        compute_(static_cast<int64_t>(size_of(plan_.precision.compute))),
        residual_(static_cast<int64_t>(size_of(plan_.precision.residual))),
        wide_(plan_.precision.compute == DType::kFp64 ? 8 : 4) {
    tokens_ =
        saturating_multiply(plan_.batch.micro_samples, plan_.batch.sequence_length / sizes_.cp);
    kept_ = sequence_ ? tokens_ / sizes_.tp : tokens_;
    list_projections();
  }

  void embedding(const Runs& runs) {
    sum(runs.forwards, shape_.hidden_size * residual_);
    if (sequence_) gather(runs.backwards, shape_.hidden_size * residual_);
  }

  void layer(int block, const Runs& runs) {
    const auto [columns, rows] = projections_.at(static_cast<size_t>(block));
    const int64_t row = shape_.hidden_size * compute_;
    sum(rows * runs.forwards, row);      // out
    sum(columns * runs.backwards, row);  // the gradient of what went in
    if (sequence_) {
      gather(columns * runs.forwards, row);                    // in
      gather(rows * runs.backwards, row);                      // the gradient of what came out
      if (runs.trains) gather(columns * runs.backwards, row);  // the input again
    }
    attention(runs);
    if (shape_.experts.count > 0) experts(runs);
  }

  // Log-sum-exp by chunks of tokens; the gradient is made in the forward.
  void head(const Runs& runs) {
    const int64_t row = shape_.hidden_size * compute_;
    if (sequence_) gather(runs.forwards, row);
    sum(runs.backwards, row);
    const int64_t chunk = std::max<int64_t>(head_chunk_tokens(local_vocabulary(), tokens_), 1);
    const auto statistics = [&](int64_t chunks, int64_t rows) {
      const int64_t calls = saturating_multiply(runs.forwards, chunks);
      count_.add(Axis::kTp, "all_reduce", calls, rows * wide_);      // largest logit
      count_.add(Axis::kTp, "all_reduce", calls, 2 * rows * wide_);  // sum, logit of the target
    };
    statistics(tokens_ / chunk, chunk);
    if (tokens_ % chunk > 0) statistics(1, tokens_ % chunk);
  }

 private:
  // Seams::column and Seams::row of a layer: weights cut along their output features, those of a
  // fuse group in one call, and weights cut along their input features.
  struct Projections {
    int64_t columns = 0, rows = 0;
  };
  void list_projections() {
    std::set<std::pair<int, int>> groups;  // of a block
    projections_.resize(static_cast<size_t>(shape_.num_blocks()));
    for (const ParamSpec& spec : plan_.model().table()) {
      const bool is_cut = spec.tensor.kind == ShardRule::Kind::kSplit && spec.shape.size() == 2;
      if (!is_cut || spec.expert >= 0) continue;
      Projections& of_block = projections_.at(static_cast<size_t>(spec.block));
      if (spec.tensor.dim == 1)
        ++of_block.rows;
      else if (spec.fuse_group < 0 || groups.emplace(spec.block, spec.fuse_group).second)
        ++of_block.columns;
    }
  }

  // Over the tensor axis: every rank hands in a part of the sum for all tokens, `row` bytes each.
  void sum(int64_t calls, int64_t row) {
    count_.add(Axis::kTp, sequence_ ? "reduce_scatter" : "all_reduce", calls,
               saturating_multiply(tokens_, row));
  }
  void gather(int64_t calls, int64_t row) {
    count_.add(Axis::kTp, "all_gather", calls, saturating_multiply(kept_, row));
  }

  [[nodiscard]] int64_t local_vocabulary() const {
    if (sizes_.tp == 1) return shape_.vocab_size;
    const int64_t rows = (shape_.vocab_size + sizes_.tp - 1) / sizes_.tp;
    return round_up(rows, plan_.model().layout.options().vocab_multiple);
  }

  void attention(const Runs& runs) {
    const int64_t cp = sizes_.cp;
    const int64_t queries = shape_.num_attention_heads / sizes_.tp;
    const int64_t keys = std::max<int64_t>(1, shape_.num_key_value_heads / sizes_.tp);
    const auto bytes_of = [&](int64_t heads, int64_t element) {
      return saturating_multiply(tokens_, heads * shape_.head_dim * element);
    };
    if (plan_.resolved.parallel.context.method == "all_to_all") {
      const int64_t own = queries / cp, own_keys = std::max<int64_t>(1, keys / cp);
      const int64_t calls = runs.forwards + runs.backwards;
      count_.add(Axis::kCp, "all_to_all", calls, cp * bytes_of(own + 2 * own_keys, compute_));
      count_.add(Axis::kCp, "all_to_all", calls, cp * bytes_of(own, compute_));
      return;
    }
    for (const char* op : {"send", "recv"}) {
      count_.add(Axis::kCp, op, (cp - 1) * (runs.forwards + runs.backwards),
                 bytes_of(2 * keys, compute_));
      // Gradients of keys and values travel one hop more, home.
      count_.add(Axis::kCp, op, cp * runs.backwards, bytes_of(2 * keys, wide_));
    }
  }

  // Rows for the experts as if the load were even: who gets how many is decided by the router.
  void experts(const Runs& runs) {
    const int64_t row = shape_.hidden_size * compute_;
    const int64_t calls = runs.forwards + runs.backwards;
    int64_t tokens = kept_;
    if (!sequence_ && sizes_.tp > 1) {  // the ranks of the tensor axis share the tokens out
      tokens = (tokens_ + sizes_.tp - 1) / sizes_.tp;
      count_.add(Axis::kTp, "all_gather", calls, saturating_multiply(tokens, row));
    }
    const int64_t rows = saturating_multiply(tokens, shape_.experts.per_token);
    count_.add(Axis::kEp, "all_to_all_v", 2 * calls, saturating_multiply(rows, row));
  }

  TrafficCount& count_;
  const Plan& plan_;
  const ModelShape& shape_;
  const Grid::Sizes& sizes_;
  bool sequence_;
  int64_t compute_, residual_, wide_;     // bytes of an element
  int64_t tokens_ = 0, kept_ = 0;         // of a micro-batch; of them on this rank between layers
  std::vector<Projections> projections_;  // by block
};

}  // namespace

// A block has a backward where it or something before it learns; what is run again, and what came
// from another stage, is always differentiated.
void count_blocks(TrafficCount& count) {
  const Plan& plan = count.plan;
  const int head = plan.model().shape.head_block();
  const auto& frozen = plan.model().layout.options().frozen_blocks;
  const auto trains = [&](int block) {
    return std::find(frozen.begin(), frozen.end(), block) == frozen.end();
  };
  const bool again = plan.resolved.parallel.recompute.mode == "block";
  const int64_t micro_batches = plan.batch.micro_batches;
  BlockCount blocks(count);
  for (const auto& chunk : count.layout.chunks) {
    bool has_gradient = chunk.front() > 0;
    for (const int block : chunk) {
      const bool is_layer = block > 0 && block < head;
      const bool learns =
          trains(block) || (block == head && trains(0) && plan.model().shape.tie_word_embeddings);
      has_gradient = has_gradient || learns;
      const Runs runs{micro_batches * (is_layer && again ? 2 : 1), has_gradient ? micro_batches : 0,
                      learns};
      if (block == 0) blocks.embedding(runs);
      if (is_layer) blocks.layer(block, runs);
      if (block == head) blocks.head(runs);
      has_gradient = has_gradient || (is_layer && again);
    }
  }
}

}  // namespace capstan::plan
