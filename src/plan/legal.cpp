// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which values of `parallel` go together and with the model. One rule per entry: what it reads,
// when it is broken, why, and the nearest legal values. What no rule refuses, runs.
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "capstan/base/bytes.h"
#include "capstan/base/text.h"
#include "capstan/plan/schedule.h"
#include "plan/resolve_internal.h"
#include "plan/schedule_internal.h"

namespace capstan::plan {
namespace {

struct Sides {
  const ModelShape& shape;
  const recipe::Parallel& parallel;
  int64_t length;
};
using Rule = std::function<std::optional<ProblemText>(const Sides&)>;

std::optional<ProblemText> need_multiple(const char* key, int64_t size, int64_t unit,
                                         const char* unit_name, const char* why) {
  if (size % unit == 0) return std::nullopt;
  return ProblemText{key, std::to_string(size), fmt::format("a multiple of {} {}", unit_name, unit),
                     why, fmt::format("Nearest: {}", nearest_multiples(size, unit))};
}

bool divide_either_way(int64_t a, int64_t b) { return a % b == 0 || b % a == 0; }

// The key and size of the features that the tensor axis cuts.
std::pair<const char*, int64_t> cut_features(const ModelShape& shape) {
  if (shape.experts.count == 0) return {"model.intermediate_size", shape.intermediate_size};
  // Experts are whole wherever they are.
  return {"model.experts.shared_intermediate_size", shape.experts.shared_intermediate_size};
}

// "parallel.tensor 2 or 4": sizes on both sides of the one given that heads and features allow.
std::string nearest_tensors(const Sides& s) {
  const auto fits = [&](int64_t tensor) {
    return s.shape.num_attention_heads % tensor == 0 &&
           divide_either_way(s.shape.num_key_value_heads, tensor) &&
           cut_features(s.shape).second % tensor == 0;
  };
  int64_t below = s.parallel.tensor, above = below;
  while (!fits(below)) --below;
  while (above <= s.shape.num_attention_heads && !fits(above)) ++above;
  return above > s.shape.num_attention_heads
             ? fmt::format("parallel.tensor {}", below)
             : fmt::format("parallel.tensor {} or {}", below, above);
}

// What to change where there are more stages than blocks.
std::string fewer_stages(const Sides& s) {
  const recipe::Pipeline& pipeline = s.parallel.pipeline;
  const int64_t blocks = s.shape.num_blocks();
  if (pipeline.chunks <= blocks)
    return fmt::format("Set parallel.pipeline.size: {}", blocks / pipeline.chunks);
  return fmt::format("Set parallel.pipeline.size: 1 and parallel.pipeline.chunks: {}", blocks);
}

const schedules::Kind* find_schedule(const std::string& name) {
  for (const schedules::Kind& kind : schedules::kinds())
    if (kind.name == name) return &kind;
  return nullptr;
}

std::string stages_per_rank(const schedules::Kind& kind) {
  if (kind.most_chunks == kind.least_chunks) return std::to_string(kind.least_chunks);
  if (kind.most_chunks == kind.least_chunks + 1)
    return fmt::format("{} or {}", kind.least_chunks, kind.most_chunks);
  return fmt::format("{} or more", kind.least_chunks);
}

// Heads, features and rows.
std::vector<Rule> shape_rules() {
  return {
      [](const Sides& s) -> std::optional<ProblemText> {
        const int64_t heads = s.shape.num_attention_heads, tensor = s.parallel.tensor;
        if (heads % tensor == 0) return std::nullopt;
        return ProblemText{"model.num_attention_heads", std::to_string(heads),
                           fmt::format("a multiple of parallel.tensor {}", tensor),
                           "each tensor-parallel rank takes an equal part",
                           "Nearest: " + nearest_tensors(s)};
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        const int64_t heads = s.shape.num_key_value_heads, tensor = s.parallel.tensor;
        const bool is_told = s.shape.num_attention_heads % tensor != 0;  // by the rule above
        if (is_told || divide_either_way(heads, tensor)) return std::nullopt;
        return ProblemText{"model.num_key_value_heads", std::to_string(heads),
                           fmt::format("a multiple or a divisor of parallel.tensor {}", tensor),
                           "key/value heads are shared out or copied evenly",
                           "Nearest: " + nearest_tensors(s)};
      },
      [](const Sides& s) {
        const auto [key, features] = cut_features(s.shape);
        return need_multiple(key, features, s.parallel.tensor, "parallel.tensor",
                             "each tensor-parallel rank takes an equal part");
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        if (!s.parallel.sequence || s.parallel.tensor > 1) return std::nullopt;
        return ProblemText{"parallel.sequence", "true", "parallel.tensor above 1",
                           "sequence parallel splits over the tensor axis",
                           "Set parallel.sequence: false"};
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        if (!s.parallel.sequence_overlap || s.parallel.sequence) return std::nullopt;
        return ProblemText{"parallel.sequence_overlap", "true", "parallel.sequence true",
                           "without it rows are not cut, so nothing travels in parts",
                           "Set parallel.sequence: true, or leave the key out"};
      },
      [](const Sides& s) {
        // Context takes two pieces of a row for each rank, sequence an equal part of both together.
        const int64_t context = s.parallel.context.size;
        const int64_t pieces = context > 1 ? 2 * context : 1;
        const int64_t parts = s.parallel.sequence ? context * s.parallel.tensor : 1;
        return need_multiple("batch.sequence_length", s.length, std::lcm(pieces, parts),
                             "2 x context, under sequence parallel also of context x tensor =",
                             "context and sequence parallel cut every row into equal parts");
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        const int64_t context = s.parallel.context.size, tensor = s.parallel.tensor;
        if (context == 1 || s.parallel.context.method != "all_to_all") return std::nullopt;
        const int64_t here = std::max<int64_t>(1, s.shape.num_key_value_heads / tensor);
        const bool heads_fit = s.shape.num_attention_heads % (tensor * context) == 0;
        if (heads_fit && (here % context == 0 || context % here == 0)) return std::nullopt;
        return ProblemText{
            "parallel.context.method",
            fmt::format("all_to_all with {} heads, {} key/value heads", s.shape.num_attention_heads,
                        s.shape.num_key_value_heads),
            fmt::format("heads that divide by tensor {} x context {}, key/value heads of a rank "
                        "({}) that divide by the context or the other way round",
                        tensor, context, here),
            "every rank attends with its own heads over the whole row",
            "Set parallel.context.method: ring"};
      },
  };
}

// Stages and the schedule that they run in.
std::vector<Rule> pipeline_rules() {
  return {
      [](const Sides& s) -> std::optional<ProblemText> {
        const recipe::Pipeline& pipeline = s.parallel.pipeline;
        const auto stages = checked_multiply(pipeline.size, pipeline.chunks);
        if (stages && *stages <= s.shape.num_blocks()) return std::nullopt;
        return ProblemText{"parallel.pipeline.size",
                           fmt::format("{} x chunks {}", pipeline.size, pipeline.chunks),
                           fmt::format("at most {} stages: {} layers, embedding and head",
                                       s.shape.num_blocks(), s.shape.num_hidden_layers),
                           "every stage holds a block", fewer_stages(s)};
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        const schedules::Kind* kind = find_schedule(s.parallel.pipeline.schedule);
        if (!kind) return std::nullopt;  // its value was refused
        const int64_t chunks = s.parallel.pipeline.chunks;
        const int64_t nearest = std::clamp<int64_t>(chunks, kind->least_chunks, kind->most_chunks);
        if (nearest == chunks) return std::nullopt;
        return ProblemText{"parallel.pipeline.chunks", std::to_string(chunks),
                           stages_per_rank(*kind),
                           fmt::format("schedule {} has that many stages per rank", kind->name),
                           fmt::format("Set parallel.pipeline.chunks: {}, or set "
                                       "parallel.pipeline.schedule: {}",
                                       nearest, chunks == 1 ? "1f1b" : "interleaved")};
      },
  };
}

// Switches that act under others only.
std::vector<Rule> switch_rules() {
  return {
      [](const Sides& s) -> std::optional<ProblemText> {
        const recipe::Zero& zero = s.parallel.zero;
        if (zero.reduce != "micro_batch" || zero.stage >= 2) return std::nullopt;
        return ProblemText{"parallel.zero.reduce", "micro_batch", "parallel.zero.stage 2 or 3",
                           fmt::format("stage {} keeps the whole gradient anyway", zero.stage),
                           "Set parallel.zero.reduce: step"};
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        const recipe::Zero& zero = s.parallel.zero;
        if (zero.reshard_after_forward || zero.stage == 3) return std::nullopt;
        return ProblemText{"parallel.zero.reshard_after_forward", "false", "parallel.zero.stage 3",
                           fmt::format("stage {} never gathers weights", zero.stage),
                           "Leave the key out"};
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        const recipe::Zero& zero = s.parallel.zero;
        if (zero.offload != "all" || zero.stage == 3) return std::nullopt;
        return ProblemText{"parallel.zero.offload", "all", "parallel.zero.stage 3",
                           "parameters come back block by block only where they are gathered",
                           "Set parallel.zero.offload: optimizer"};
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        const recipe::Recompute& recompute = s.parallel.recompute;
        if (recompute.parts.empty() || recompute.mode == "selective") return std::nullopt;
        return ProblemText{"parallel.recompute.parts", join(recompute.parts, ", "), "no parts",
                           "recompute.mode is " + recompute.mode, "Leave the key out"};
      },
  };
}

const std::vector<Rule>& rules() {
  static const std::vector<Rule> table = [] {
    std::vector<Rule> all = shape_rules();
    for (auto part : {pipeline_rules(), switch_rules()})
      all.insert(all.end(), part.begin(), part.end());
    return all;
  }();
  return table;
}

}  // namespace

void check_layout(Draft& draft, const ModelShape& shape) {
  const Sides sides{shape, draft.recipe.parallel, draft.recipe.batch.sequence_length};
  for (const Rule& rule : rules())
    if (auto problem = rule(sides)) draft.refuse(std::move(*problem));
}

int64_t round_of(const recipe::Pipeline& pipeline) {
  const schedules::Kind* kind = find_schedule(pipeline.schedule);
  return kind && kind->in_rounds ? pipeline.size : 1;
}

void check_schedule_fits(Draft& draft, const BatchPlan& batch) {
  const recipe::Pipeline& pipeline = draft.recipe.parallel.pipeline;
  const auto problem =
      schedule_problem(pipeline.schedule, static_cast<int>(pipeline.size),
                       static_cast<int>(batch.micro_batches), static_cast<int>(pipeline.chunks));
  if (!problem) return;
  const int64_t round = batch.global_samples / batch.micro_batches * pipeline.size;
  draft.refuse({"batch.global_samples",
                fmt::format("{}, which makes {} micro-batches of every rank", batch.global_samples,
                            batch.micro_batches),
                fmt::format("a multiple of the {} samples of a round of {} micro-batches", round,
                            pipeline.size),
                *problem,
                fmt::format("Nearest: {}; or change batch.micro_samples or the schedule",
                            nearest_multiples(batch.global_samples, round))});
}

}  // namespace capstan::plan
