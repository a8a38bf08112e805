// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which values of `parallel` go together and with the model. One rule per entry: what it reads,
// when it is broken, why, and the nearest legal values. What no rule refuses, runs.
#include <fmt/format.h>

#include <algorithm>
#include <functional>

#include "capstan/base/bytes.h"
#include "capstan/base/text.h"
#include "capstan/plan/schedule.h"
#include "plan/resolve_internal.h"

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

// "1, 2 or 4": the divisors of n up to `most`.
std::string divisors(int64_t n, int64_t most) {
  std::vector<std::string> found;
  for (int64_t d = 1; d <= std::min(n, most); ++d)
    if (n % d == 0) found.push_back(std::to_string(d));
  return join(found, ", ");
}

const std::vector<Rule>& rules() {
  static const std::vector<Rule> table = {
      [](const Sides& s) {
        return need_multiple("model.num_attention_heads", s.shape.num_attention_heads,
                             s.parallel.tensor, "parallel.tensor",
                             "each tensor-parallel rank takes an equal part");
      },
      [](const Sides& s) {
        const bool dense = s.shape.experts.count == 0;  // experts are whole wherever they are
        return need_multiple(
            dense ? "model.intermediate_size" : "model.experts.shared_intermediate_size",
            dense ? s.shape.intermediate_size : s.shape.experts.shared_intermediate_size,
            s.parallel.tensor, "parallel.tensor", "each tensor-parallel rank takes an equal part");
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        const int64_t heads = s.shape.num_key_value_heads, tensor = s.parallel.tensor;
        if (heads % tensor == 0 || tensor % heads == 0) return std::nullopt;
        return ProblemText{"model.num_key_value_heads", std::to_string(heads),
                           fmt::format("a multiple or a divisor of parallel.tensor {}", tensor),
                           "key/value heads are shared out or copied evenly",
                           fmt::format("Nearest: parallel.tensor {}", divisors(heads, tensor))};
      },
      [](const Sides& s) -> std::optional<ProblemText> {
        if (!s.parallel.sequence || s.parallel.tensor > 1) return std::nullopt;
        return ProblemText{"parallel.sequence", "true", "parallel.tensor above 1",
                           "sequence parallel splits over the tensor axis",
                           "Set parallel.sequence: false"};
      },
      [](const Sides& s) {
        const int64_t context = s.parallel.context.size;
        const int64_t unit =
            (context > 1 ? 2 * context : 1) * (s.parallel.sequence ? s.parallel.tensor : 1);
        return need_multiple("batch.sequence_length", s.length, unit,
                             "2 x context, x tensor under sequence parallel =",
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
      [](const Sides& s) -> std::optional<ProblemText> {
        const recipe::Pipeline& pipeline = s.parallel.pipeline;
        const auto stages = checked_multiply(pipeline.size, pipeline.chunks);
        if (stages && *stages <= s.shape.num_blocks()) return std::nullopt;
        return ProblemText{"parallel.pipeline.size",
                           fmt::format("{} x chunks {}", pipeline.size, pipeline.chunks),
                           fmt::format("at most {} stages: {} layers, embedding and head",
                                       s.shape.num_blocks(), s.shape.num_hidden_layers),
                           "every stage holds a block", ""};
      },
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
  return table;
}

}  // namespace

void check_layout(Draft& draft, const ModelShape& shape) {
  const Sides sides{shape, draft.recipe.parallel, draft.recipe.batch.sequence_length};
  for (const Rule& rule : rules())
    if (auto problem = rule(sides)) draft.refuse(std::move(*problem));
}

void check_schedule_fits(Draft& draft, const BatchPlan& batch) {
  const recipe::Pipeline& pipeline = draft.recipe.parallel.pipeline;
  const auto problem =
      schedule_problem(pipeline.schedule, static_cast<int>(pipeline.size),
                       static_cast<int>(batch.micro_batches), static_cast<int>(pipeline.chunks));
  if (!problem) return;
  draft.refuse({"parallel.pipeline.schedule",
                fmt::format("{} with {} ranks, {} chunks and {} micro-batches", pipeline.schedule,
                            pipeline.size, pipeline.chunks, batch.micro_batches),
                "a step that this schedule can run", *problem,
                "Change batch.global_samples, batch.micro_samples or the schedule"});
}

}  // namespace capstan::plan
