// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the blocks of a rank exchange over the tensor, context and expert axes. The table is meant
// to be read beside the seams in parallel: a collective there is a line here. Tokens: those of one
// micro-batch in this rank's context part.
#include <algorithm>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/plan/experts.h"
#include "plan/moe_internal.h"
#include "plan/traffic_internal.h"

namespace capstan::plan {
namespace {

// How often the micro-batches of a step go through a block.
struct Runs {
  int64_t forwards = 0, backwards = 0;
  // Forwards of parts of a layer by selective recompute, where something in them is differentiated.
  int64_t attention_again = 0, mlp_again = 0;
};

// Which parts of a block are trained. A name that the block does not have stands for all of it.
class Trained {
 public:
  Trained(const std::vector<ParamSpec>& table, int block) : table_(table), block_(block) {}
  [[nodiscard]] bool knows(std::string_view name) const {
    return std::any_of(table_.begin(), table_.end(), [&](const ParamSpec& spec) {
      return spec.block == block_ && spec.name.find(name) != std::string::npos;
    });
  }
  [[nodiscard]] bool operator()(std::string_view name = "") const {
    bool exists = false;
    for (const ParamSpec& spec : table_) {
      if (spec.block != block_ || spec.name.find(name) == std::string::npos) continue;
      if (spec.trainable) return true;
      exists = true;
    }
    return !exists && !name.empty() && (*this)();
  }

 private:
  const std::vector<ParamSpec>& table_;
  int block_;
};

// The parameters of a layer that its traffic hangs on; parts of their names.
struct LayerNames {
  std::string_view norm, query, out, second_norm, column, row;
};
const LayerNames& layer_names(const ModelShape& shape) {
  static const LayerNames llama{"input_layernorm",          "self_attn.q_proj", "self_attn.o_proj",
                                "post_attention_layernorm", "mlp.gate_proj",    "mlp.down_proj"};
  static const LayerNames gpt2{"ln_1", ".attn.q_proj", ".attn.c_proj",
                               "ln_2", "mlp.c_fc",     "mlp.c_proj"};
  return shape.family == "gpt2" ? gpt2 : llama;
}

// A product into split features and one out of them.
struct Pair {
  bool in = false;       // the gradient of what goes in is wanted
  bool between = false;  // of the split features
  bool column = false;   // the first one's weights are trained
  bool row = false;      // the second one's
  bool out = false;      // the gradient of what comes out is wanted
};

class BlockCount {
 public:
  explicit BlockCount(TrafficCount& count)
      : count_(count),
        plan_(count.plan),
        shape_(plan_.model().shape),
        sizes_(plan_.grid.sizes()),
        sequence_(plan_.resolved.parallel.sequence),
        overlap_(plan_.resolved.parallel.sequence_overlap),
        compute_(static_cast<int64_t>(size_of(plan_.precision.compute))),
        residual_(static_cast<int64_t>(size_of(plan_.precision.residual))),
        wide_(plan_.precision.compute == DType::kFp64 ? 8 : 4) {
    tokens_ =
        saturating_multiply(plan_.batch.micro_samples, plan_.batch.sequence_length / sizes_.cp);
    kept_ = sequence_ ? tokens_ / sizes_.tp : tokens_;
    list_projections();
  }

  // Each says whether the gradient of what comes out is wanted.
  [[nodiscard]] bool embedding(const Runs& runs) {
    const Trained trained(plan_.model().table(), 0);
    sum(runs.forwards, shape_.hidden_size * residual_);
    // Of the vocabulary; learned positions are looked up without their neighbours.
    if (sequence_ && trained("wte")) gather(runs.backwards, shape_.hidden_size * residual_);
    return trained();
  }

  [[nodiscard]] bool layer(const Runs& runs, int block, bool live) {
    const Trained trained(plan_.model().table(), block);
    if (!has_known_layers(block, trained)) return other_layer(runs, block, live);
    const LayerNames& names = layer_names(shape_);
    Pair heads = pair_of(trained, live || trained(names.norm), names.query, names.out);
    if (shape_.qk_norm && (trained("q_norm") || trained("k_norm")))
      heads.between = heads.out = true;
    const int64_t again = heads.between ? runs.attention_again : 0;
    pair(runs, heads, again);
    attention({runs.forwards + again, heads.between ? runs.backwards : 0});
    live = heads.out || trained(names.second_norm);
    if (shape_.experts.count > 0) return moe(runs, trained, live);
    const Pair features = pair_of(trained, live, names.column, names.row);
    pair(runs, features, features.between ? runs.mlp_again : 0);
    return features.out;
  }

  // Log-sum-exp by chunks of tokens; the gradient is made in the forward.
  void head(const Runs& runs, bool live) {
    const int64_t row = shape_.hidden_size * compute_;
    const std::vector<ParamSpec>& table = plan_.model().table();
    const bool trains = Trained(table, shape_.head_block())() ||
                        (shape_.tie_word_embeddings && Trained(table, 0)());
    if (sequence_) gather(runs.forwards, row);
    if (live || trains) sum(runs.backwards, row);
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
  // again: more forwards, up to the product out.
  void pair(const Runs& runs, const Pair& pair, int64_t again) {
    sum_parts(runs.forwards);                // out
    if (pair.in) sum_parts(runs.backwards);  // the gradient of what went in
    if (!sequence_) return;
    gather_parts(runs.forwards + again);                         // in
    if (pair.between || pair.row) gather_parts(runs.backwards);  // the gradient of what came out
    if (pair.column) gather_parts(runs.backwards);               // the input again
  }

  [[nodiscard]] static Pair pair_of(const Trained& trained, bool live, std::string_view column,
                                    std::string_view row) {
    const auto weight = [&](std::string_view name) {
      return trained(std::string(name) + ".weight");
    };
    const auto bias = [&](std::string_view name) {
      const std::string full = std::string(name) + ".bias";
      return trained.knows(full) && trained(full);
    };
    Pair pair{.in = live, .column = weight(column), .row = weight(row)};
    pair.between = live || pair.column || bias(column);
    pair.out = pair.between || pair.row || bias(row);
    return pair;
  }

  // The experts, the shared one with them: one part for selective recompute, to its end.
  [[nodiscard]] bool moe(const Runs& runs, const Trained& trained, bool live) {
    const ExpertNames& names = expert_names(shape_.family);
    const bool has_shared = shape_.experts.shared_intermediate_size > 0;
    const bool trains = trained(names.expert);
    const Pair shared =
        has_shared ? pair_of(trained, live, names.shared + "gate_proj", names.shared + "down_proj")
                   : Pair{};
    const bool learns = live || trains || trained(names.router + ".weight") || shared.between ||
                        shared.row || (shape_.experts.shared_gate && trained(names.shared_gate));
    const int64_t again = learns ? runs.mlp_again : 0;
    experts({runs.forwards + again, runs.backwards}, live, trains);
    if (has_shared) {
      pair(runs, shared, again);
      sum_parts(again);  // out
    }
    return learns;
  }

  // Attention, and an MLP or experts, as llama has them and nothing else.
  [[nodiscard]] bool has_known_layers(int block, const Trained& trained) const {
    const auto [columns, rows] = projections_.at(static_cast<size_t>(block));
    const bool has_mlp = shape_.experts.count == 0 || shape_.experts.shared_intermediate_size > 0;
    const int64_t pairs = has_mlp ? 2 : 1;
    return trained.knows(layer_names(shape_).query) && columns == pairs && rows == pairs;
  }

  // Of a family whose layers the plan knows by their weights alone: all of it learns, or none.
  [[nodiscard]] bool other_layer(const Runs& runs, int block, bool live) {
    const auto [columns, rows] = projections_.at(static_cast<size_t>(block));
    const bool trains = Trained(plan_.model().table(), block)();
    live = live || trains;
    const int64_t backwards = live ? runs.backwards : 0;
    sum_parts(rows * runs.forwards);  // out
    sum_parts(columns * backwards);   // the gradient of what went in
    if (sequence_) {
      gather_parts(columns * runs.forwards);          // in
      gather_parts(rows * backwards);                 // the gradient of what came out
      if (trains) gather_parts(columns * backwards);  // the input again
    }
    attention({runs.forwards, backwards});
    if (shape_.experts.count > 0) experts(runs, live, trains);
    return live;
  }

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

  // Of column and row layers: rows as a whole, or part by part.
  void sum_parts(int64_t calls) {
    const int64_t hidden = shape_.hidden_size;
    if (!overlap_) return sum(calls, hidden * compute_);
    go_round(calls, hidden * std::max<int64_t>(compute_, 4));  // kept in at least fp32
  }
  void gather_parts(int64_t calls) {
    const int64_t row = shape_.hidden_size * compute_;
    overlap_ ? go_round(calls, row) : gather(calls, row);
  }
  // A part passes every other rank.
  void go_round(int64_t times, int64_t row) {
    for (const char* op : {"send", "recv"})
      count_.add(Axis::kTp, op, (sizes_.tp - 1) * times, saturating_multiply(kept_, row));
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

  // Rows for the experts: as many as they have room for, or as if the load were even, since who
  // gets how many is decided by the router.
  void experts(const Runs& runs, bool live, bool trains) {
    const int64_t row = shape_.hidden_size * compute_;
    int64_t tokens = kept_;
    if (!sequence_ && sizes_.tp > 1) {  // the ranks of the tensor axis share the tokens out
      tokens = (tokens_ + sizes_.tp - 1) / sizes_.tp;
      const int64_t calls = runs.forwards + (live ? runs.backwards : 0);
      count_.add(Axis::kTp, "all_gather", calls, saturating_multiply(tokens, row));
    }
    const int64_t backwards = (live || trains ? runs.backwards : 0) + (live ? runs.backwards : 0);
    const int64_t fixed = exchanged_rows(plan_.resolved, shape_, plan_.batch, tokens);
    const int64_t rows = fixed > 0 ? fixed : saturating_multiply(tokens, shape_.experts.per_token);
    count_.add(Axis::kEp, fixed > 0 ? "all_to_all" : "all_to_all_v", 2 * runs.forwards + backwards,
               saturating_multiply(rows, row));
  }

  TrafficCount& count_;
  const Plan& plan_;
  const ModelShape& shape_;
  const Grid::Sizes& sizes_;
  bool sequence_, overlap_;
  std::vector<Projections> projections_;  // by block
  int64_t compute_, residual_, wide_;     // bytes of an element
  int64_t tokens_ = 0, kept_ = 0;         // of a micro-batch; of them on this rank between layers
};

}  // namespace

// Something has a gradient where it or something before it in the stage learns; what is run again,
// and what came from another stage, always has one.
void count_blocks(TrafficCount& count) {
  const Plan& plan = count.plan;
  const int head = plan.model().shape.head_block();
  const bool again = plan.resolved.parallel.recompute.mode == "block";
  const RemadeParts remade = remade_parts(plan.resolved.parallel.recompute);
  const int64_t micro_batches = plan.batch.micro_batches;
  BlockCount blocks(count);
  for (const auto& chunk : count.layout.chunks) {
    bool live = chunk.front() > 0;
    for (const int block : chunk) {
      const bool is_layer = block > 0 && block < head;
      const Runs runs{micro_batches * (is_layer && again ? 2 : 1), micro_batches,
                      remade.attention ? micro_batches : 0, remade.mlp ? micro_batches : 0};
      if (block == 0) live = blocks.embedding(runs);
      if (is_layer) live = blocks.layer(runs, block, live) || again;
      if (block == head) blocks.head(runs, live);
    }
  }
}

}  // namespace capstan::plan
