// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The smallest run of a layout. Each step shrinks one thing and notes it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "capstan/base/text.h"
#include "capstan/plan/frozen.h"
#include "capstan/plan/keep_wide.h"
#include "capstan/trainer/prove.h"

namespace capstan::trainer {
namespace {

int64_t multiple_from(int64_t least, int64_t unit) { return (least + unit - 1) / unit * unit; }
int compare(int64_t a, int64_t b) { return a < b ? -1 : a > b ? 1 : 0; }

// The largest proper divisor, at least 2: what divided by n still divides by it.
int shorten(int n) {
  for (int d = 2; d * d <= n; ++d)
    if (n % d == 0) return n / d;
  return 2;
}

std::string spell(int64_t value) { return std::to_string(value); }
std::string spell(double value) { return fmt::format("{:g}", value); }
std::string spell(const std::optional<double>& value) { return value ? spell(*value) : "none"; }

class Reducer {
 public:
  Reducer(const plan::Plan& whole, int most_ranks)
      : whole_(whole),
        before_(whole.grid.sizes()),
        axes_(before_),
        most_ranks_(most_ranks),
        r_(whole.resolved) {}

  ReducedRun run() {
    shrink_axes();
    shrink_heads();
    shrink_width();
    shrink_experts();
    shrink_layers();
    keep_frozen();
    keep_wide();
    shrink_row();
    shrink_batch();
    set_numbers();
    run_.recipe = std::move(r_);
    run_.ranks = ranks();
    return std::move(run_);
  }

 private:
  template <class T>
  void set(const char* key, T& place, const T& value, const std::string& why) {
    note(key, spell(place), spell(value), why);
    place = value;
  }
  void note(const std::string& key, const std::string& before, const std::string& after,
            const std::string& why) {
    if (before != after) run_.notes.push_back({key, before, after, why});
  }

  [[nodiscard]] int ranks() const { return plan::Grid(axes_).size(); }
  [[nodiscard]] const plan::ModelShape& shape() const { return whole_.model().shape; }

  void shrink_axes() {
    const auto size = [&] {
      return int64_t{axes_.pp} * axes_.dp_replicate * axes_.dp_shard * axes_.cp * axes_.tp;
    };
    while (size() > most_ranks_) {
      int* axis = &axes_.pp;
      for (int* other : {&axes_.cp, &axes_.tp})
        if (*other > *axis) axis = other;
      if (axes_.dp_shard > 2) axis = &axes_.dp_shard;
      if (axes_.dp_replicate > 2) axis = &axes_.dp_replicate;
      if (*axis <= 2) break;  // fewer ranks than this have no layout
      *axis = shorten(*axis);
    }
    axes_.ep = std::gcd(axes_.ep, axes_.dp_shard * axes_.cp * axes_.tp);
    recipe::Parallel& p = r_.parallel;
    const std::string why = fmt::format("at most {} ranks", most_ranks_);
    note("parallel.data (replicas x shards)",
         fmt::format("{} x {}", before_.dp_replicate, before_.dp_shard),
         fmt::format("{} x {}", axes_.dp_replicate, axes_.dp_shard), why);
    p.data = axes_.dp_replicate * axes_.dp_shard;
    if (p.zero.stage > 0) p.zero.shard_size = axes_.dp_shard;
    set("parallel.pipeline.size", p.pipeline.size, int64_t{axes_.pp}, why);
    set("parallel.context.size", p.context.size, int64_t{axes_.cp}, why);
    set("parallel.tensor", p.tensor, int64_t{axes_.tp}, why);
    set("parallel.expert", p.expert, int64_t{axes_.ep}, why);
    const auto buckets = plan::make_buckets(whole_.model().layout.rank(0),
                                            whole_.precision.gradients, whole_.bucket_bytes);
    if (buckets.size() > 1) run_.bucket_bytes = 1;  // one for each flat buffer
  }

  // As many key/value heads as the layout needs, and as many query heads for each as before.
  [[nodiscard]] bool heads_fit(int64_t heads, int64_t kv) const {
    const int64_t t = axes_.tp, c = axes_.cp;
    if (heads % t != 0 || (kv % t != 0 && t % kv != 0)) return false;
    if (c == 1 || r_.parallel.context.method != "all_to_all") return true;
    const int64_t here = std::max<int64_t>(1, kv / t);
    return heads % (t * c) == 0 && (here % c == 0 || c % here == 0);
  }
  // Cut, one each or copied: what happens to key/value heads along both axes that take heads.
  [[nodiscard]] bool same_kind(int64_t kv) const {
    const int64_t before = shape().num_key_value_heads;
    const auto here = [](int64_t heads, int64_t t) { return std::max<int64_t>(1, heads / t); };
    return compare(kv, axes_.tp) == compare(before, before_.tp) &&
           compare(here(kv, axes_.tp), axes_.cp) == compare(here(before, before_.tp), before_.cp);
  }
  void shrink_heads() {
    const int64_t ratio = shape().num_attention_heads / shape().num_key_value_heads;
    const int64_t most = std::max<int64_t>(shape().num_key_value_heads, 4 * axes_.tp * axes_.cp);
    int64_t legal = 0, kv = 0;
    for (int64_t n = 1; n <= most && kv == 0; ++n) {
      if (!heads_fit(ratio * n, n)) continue;
      if (legal == 0) legal = n;
      if (same_kind(n)) kv = n;
    }
    if (kv == 0) kv = legal;
    recipe::Model& m = r_.model;
    note("model.num_key_value_heads", spell(*m.num_key_value_heads), spell(kv),
         fmt::format("over tensor {}, context {}", axes_.tp, axes_.cp));
    m.num_key_value_heads = kv;
    set("model.num_attention_heads", m.num_attention_heads, ratio * kv,
        fmt::format("{} for each key/value head", ratio));
  }

  void shrink_width() {
    recipe::Model& m = r_.model;
    const int64_t heads = m.num_attention_heads, width_before = *m.head_dim * heads_before();
    const int64_t head = std::max<int64_t>(4, multiple_from((16 + heads - 1) / heads, 2));
    note("model.head_dim", spell(*m.head_dim), spell(head), "even, at least 16 features in all");
    m.head_dim = head;
    int64_t hidden = heads * head;
    if (m.hidden_size != width_before) hidden = m.hidden_size > width_before ? hidden * 2 : 12;
    set("model.hidden_size", m.hidden_size, hidden, "heads x head_dim, where it was");
    set("model.intermediate_size", m.intermediate_size, multiple_from(24, axes_.tp),
        fmt::format("a multiple of tensor {}", axes_.tp));
    // Rows are padded to 64 on every rank of the tensor axis, unless they fit.
    const int64_t whole = 64 * axes_.tp;
    const bool fits = axes_.tp > 1 && shape().vocab_size % (64 * before_.tp) == 0;
    const int64_t vocab = fits ? whole : whole - 3;
    note("model.vocab_size", spell(*m.vocab_size), spell(vocab),
         axes_.tp == 1 ? ""
         : fits        ? "without padding"
                       : "with padding");
    m.vocab_size = vocab;
  }
  [[nodiscard]] int64_t heads_before() const { return shape().num_attention_heads; }

  void shrink_experts() {
    recipe::Experts& e = r_.model.experts;
    if (e.count == 0) return;
    const int64_t unit = std::lcm(int64_t{axes_.ep}, e.groups);
    const int64_t local = std::min<int64_t>(2, e.count / before_.ep);
    int64_t count = unit;
    const auto is_enough = [&] {
      return count >= std::min(e.per_token + 1, e.count) && count / axes_.ep >= local &&
             count / e.groups >= std::min<int64_t>(2, e.count / e.groups) &&
             count / e.groups * e.groups_per_token >= e.per_token;
    };
    while (!is_enough()) count += unit;
    set("model.experts.count", e.count, count,
        fmt::format("{} per token, over expert {}", e.per_token, axes_.ep));
    note("model.experts.intermediate_size", spell(*e.intermediate_size), "12", "");
    e.intermediate_size = 12;
    if (e.shared_intermediate_size > 0)
      set("model.experts.shared_intermediate_size", e.shared_intermediate_size,
          multiple_from(16, axes_.tp), fmt::format("a multiple of tensor {}", axes_.tp));
  }

  // Two layers for every stage where there were two, more where weights are gathered further ahead;
  // one more where they were not even.
  void shrink_layers() {
    recipe::Pipeline& pipe = r_.parallel.pipeline;
    int64_t& layers = r_.model.num_hidden_layers;
    const int64_t stages = pipe.size * pipe.chunks, stages_before = before_.pp * pipe.chunks;
    const recipe::Zero& zero = r_.parallel.zero;
    const int64_t wanted = zero.stage == 3 ? std::max<int64_t>(2, zero.prefetch + 1) : 2;
    if (pipe.split && axes_.pp == before_.pp) {
      split_stages(*pipe.split, wanted);
      return;
    }
    pipe.split.reset();
    const int64_t each = std::min(wanted, layers / stages_before);
    const int64_t bare = std::max<int64_t>(0, stages_before - layers);  // embedding or head alone
    const int64_t uneven = bare == 0 && layers % stages_before != 0 ? 1 : 0;
    const int64_t count = bare > 0 ? std::max<int64_t>(1, stages - bare) : each * stages + uneven;
    set("model.num_hidden_layers", layers, std::min(layers, count),
        fmt::format("{} {}", stages, stages == 1 ? "stage" : "stages"));
  }
  // Stages of one size stay of one size, larger ones stay larger.
  void split_stages(std::vector<int64_t>& split, int64_t wanted) {
    int64_t least = 0;
    for (const int64_t n : split)
      if (n > 0 && (least == 0 || n < least)) least = n;
    const std::string before = join_numbers(split);
    int64_t layers = 0;
    for (int64_t& n : split) {
      const int64_t base = std::min(least, wanted);
      n = n == 0 ? 0 : base + (n > least ? 1 : 0);
      layers += n;
    }
    note("parallel.pipeline.split", before, join_numbers(split), "larger stages stay larger");
    set("model.num_hidden_layers", r_.model.num_hidden_layers, layers, "parallel.pipeline.split");
  }
  static std::string join_numbers(const std::vector<int64_t>& numbers) {
    std::vector<std::string> words;
    for (const int64_t n : numbers) words.push_back(std::to_string(n));
    return "[" + join(words, ", ") + "]";
  }

  [[nodiscard]] std::vector<plan::ParamSpec> small_table() {
    plan::ModelShape small = shape();
    small.num_hidden_layers = r_.model.num_hidden_layers;
    small.experts.count = r_.model.experts.count;
    return plan::find_family(small.family).param_table(small);
  }
  // Patterns that name what is left; none where these would not do.
  template <class Works>
  void keep_patterns(const char* key, std::vector<std::string>& patterns, const Works& works) {
    if (patterns.empty()) return;
    const auto table = small_table();
    const std::string before = join(patterns, " ");
    std::erase_if(patterns,
                  [&](const auto& pattern) { return !plan::matches_any(table, pattern); });
    if (!works(table)) patterns.clear();
    note(key, before, patterns.empty() ? "nothing" : join(patterns, " "),
         "parameters that are left");
  }
  void keep_frozen() {
    std::vector<std::string>& patterns = r_.model.frozen;
    keep_patterns("model.frozen", patterns, [&](const auto& all) {
      const auto table = plan::freeze(all, patterns);
      const bool trains =
          std::any_of(table.begin(), table.end(), [](const auto& spec) { return spec.trainable; });
      return trains && plan::frozen_apart(table).empty();
    });
  }
  void keep_wide() {
    std::vector<std::string>& patterns = r_.precision.keep_fp32;
    keep_patterns("precision.keep_fp32", patterns, [&](const auto& all) {
      return plan::wide_apart(plan::keep_wide(all, patterns)).empty();
    });
  }

  void shrink_row() {
    const int64_t unit = (axes_.cp > 1 ? 2 * axes_.cp : 1) * (r_.parallel.sequence ? axes_.tp : 1);
    const int64_t before = r_.batch.sequence_length;
    const int64_t length =
        std::max(unit, std::min(before / unit * unit, multiple_from(16, 2 * unit)));
    set("batch.sequence_length", r_.batch.sequence_length, length,
        unit == 1 ? "" : fmt::format("a multiple of {} for context and sequence", unit));
    r_.model.max_position_embeddings = length;
    std::optional<int64_t>& window = r_.model.sliding_window;
    if (!window) return;
    const double part = static_cast<double>(*window) / static_cast<double>(before);
    const int64_t keys = std::clamp<int64_t>(
        std::llround(std::min(1.0, part) * static_cast<double>(length)), 1, length);
    note("model.sliding_window", spell(*window), spell(keys), "the same part of a row");
    window = keys;
  }

  // As many micro-batches as show what the schedule does with them: fewer than pipeline ranks, as
  // many, a multiple or none of it.
  void shrink_batch() {
    const int64_t before = whole_.batch.micro_batches, p = before_.pp, q = axes_.pp;
    int64_t count = std::min<int64_t>(before, 3);
    if (p > 1 && before >= p) count = before % p != 0 ? q + 1 : before == p ? q : 2 * q;
    if (p > 1 && before < p) count = std::min(before, q > 1 ? q - 1 : 1);
    const int64_t micro = std::min<int64_t>(r_.batch.micro_samples, 2);
    note("micro-batches per step and rank", spell(before), spell(count),
         p > 1 ? fmt::format("pipeline {}", q) : "");
    set("batch.micro_samples", r_.batch.micro_samples, micro, "");
    set("batch.global_samples", r_.batch.global_samples, count * micro * *r_.parallel.data,
        "micro-batches x micro_samples x data");
  }

  // Of the second moment; rules without one move weights by signs.
  [[nodiscard]] bool has_root() const {
    return r_.optimizer.name != "lion" && r_.optimizer.name != "sophia";
  }

  // What is added to all scores of a query changes nothing, so the gradient of gpt2's key biases
  // is rounding, of which Lion takes the sign. One product reads queries and values with them.
  void freeze_key_biases() {
    if (r_.model.family != "gpt2" || has_root()) return;
    std::vector<std::string>& patterns = r_.model.frozen;
    const std::string before = join(patterns, " ");
    for (const char* pattern : {"*.q_proj.bias", "*.k_proj.bias", "*.v_proj.bias"})
      patterns.emplace_back(pattern);
    note("model.frozen", before.empty() ? "nothing" : before, join(patterns, " "),
         "rounding is no part of a layout");
  }

  // Numbers that make every part of a few steps count.
  void set_numbers() {
    if (whole_.precision.reduction != whole_.precision.gradients)
      note("precision.reduction", r_.precision.reduction, "fp64",
           "rounding is no part of a layout");
    if (r_.precision.fp8.scaling != "none")
      note("precision.fp8.scaling", r_.precision.fp8.scaling, "none",
           "rounding is no part of a layout");
    r_.precision = {.compute = "fp64",
                    .residual = "fp64",
                    .master = "fp64",
                    .gradients = "fp64",
                    .reduction = "auto",
                    .keep_fp32 = std::move(r_.precision.keep_fp32),
                    .loss_scale = {},
                    .fp8 = {}};
    note("precision.compute", whole_.resolved.precision.compute, "fp64", "a proof, not a sample");
    note("optimizer.moments", r_.optimizer.moments, "auto", "rounding is no part of a layout");
    r_.optimizer.moments = "auto";
    const double range =
        std::min(0.15, 0.85 / std::sqrt(static_cast<double>(r_.model.hidden_size)));
    set("model.initializer_range", r_.model.initializer_range, range, "a narrow model");
    set("optimizer.lr", r_.optimizer.lr, 1e-2, "weights move within a few steps");
    // A gradient near zero is rounding, which a smaller eps would blow up to a whole update.
    if (has_root() && r_.optimizer.eps < 1e-6)
      set("optimizer.eps", r_.optimizer.eps, 1e-6, "above rounding");
    if (r_.optimizer.name == "sophia")
      set("optimizer.sophia.interval", r_.optimizer.sophia.interval,
          std::min<int64_t>(r_.optimizer.sophia.interval, 2), "within the run");
    freeze_key_biases();
    if (r_.optimizer.spike_skip.sigma) {
      note("optimizer.spike_skip.sigma", spell(r_.optimizer.spike_skip.sigma), "none",
           "its window is longer than the run");
      r_.optimizer.spike_skip = {};
    }
    recipe::LrSchedule& lr = r_.lr_schedule;
    const int64_t step =
        lr.unit == "tokens" ? r_.batch.global_samples * r_.batch.sequence_length : 1;
    set("lr_schedule.warmup", lr.warmup, std::min(lr.warmup, 2 * step), "within the run");
    const bool has_decay = lr.kind != "constant" && lr.kind != "inverse_sqrt";
    lr.decay = has_decay ? std::optional(kSteps * step - lr.warmup) : std::nullopt;
    r_.run.steps = kSteps;
    r_.run.tokens.reset();
    r_.run.threads = 1;
    r_.run.device = "cpu";
    if (r_.run.graphs) note("run.graphs", "true", "false", "graphs are a GPU's");
    r_.run.graphs = false;
    r_.data.tokenizer.reset();
    r_.data.train = {{.path = "drawn"}};
    r_.data.validation.clear();
  }

  static constexpr int64_t kSteps = 50;
  const plan::Plan& whole_;
  const plan::Grid::Sizes before_;
  plan::Grid::Sizes axes_;
  const int most_ranks_;
  recipe::Recipe r_;
  ReducedRun run_;
};

}  // namespace

ReducedRun reduce_run(const plan::Plan& whole, int most_ranks) {
  return Reducer(whole, most_ranks).run();
}

recipe::Recipe on_one_rank(const recipe::Recipe& recipe) {
  recipe::Recipe one = recipe;
  one.parallel = {};
  one.parallel.data = 1;
  one.batch.micro_samples = one.batch.global_samples;
  one.optimizer.in_backward = false;
  return one;
}

std::string describe_layout(const recipe::Recipe& recipe, int ranks) {
  const recipe::Parallel& p = recipe.parallel;
  std::vector<std::string> parts;
  if (p.tensor > 1)
    parts.push_back(fmt::format("tensor {}{}{}", p.tensor, p.sequence ? " with sequence" : "",
                                p.sequence_overlap ? ", overlapped" : ""));
  if (p.pipeline.size > 1)
    parts.push_back(
        fmt::format("pipeline {} ({}{})", p.pipeline.size, p.pipeline.schedule,
                    p.pipeline.chunks > 1 ? fmt::format(", {} chunks", p.pipeline.chunks) : ""));
  if (p.context.size > 1)
    parts.push_back(fmt::format("context {} ({})", p.context.size, p.context.method));
  if (p.expert > 1) parts.push_back(fmt::format("expert {}", p.expert));
  const int64_t data = p.data.value_or(1);
  if (data > 1 || p.zero.stage > 0)
    parts.push_back(fmt::format(
        "data {}{}", data,
        p.zero.stage > 0
            ? fmt::format(" (ZeRO {}, {} shards{})", p.zero.stage, p.zero.shard_size.value_or(data),
                          p.zero.offload == "none" ? "" : ", offload " + p.zero.offload)
            : ""));
  if (p.recompute.mode != "none")
    parts.push_back("recompute " + (p.recompute.mode == "block"
                                        ? "of blocks"
                                        : "of " + join(p.recompute.parts, ", ")));
  if (p.offload_activations) parts.push_back("activations offloaded");
  if (parts.empty()) return fmt::format("{} rank{}", ranks, ranks == 1 ? "" : "s");
  return fmt::format("{} on {} rank{}", join(parts, ", "), ranks, ranks == 1 ? "" : "s");
}

}  // namespace capstan::trainer
