// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Batch arithmetic, run length and learning-rate phases.
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/bytes.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {

std::optional<BatchPlan> resolve_batch(Draft& draft, const Grid& grid) {
  const recipe::Batch& batch = draft.recipe.batch;
  const int64_t data = grid.data_parallel_size();
  const auto unit = checked_multiply(batch.micro_samples, data);
  const auto tokens = checked_multiply(batch.global_samples, batch.sequence_length);
  if (!unit || *unit == 0 || batch.global_samples % *unit != 0) {
    const auto round = checked_multiply(unit.value_or(0), round_of(draft.recipe.parallel.pipeline));
    const std::string fix =
        round && *round > 0
            ? fmt::format("Nearest: {}; or change batch.micro_samples or the number of ranks",
                          nearest_multiples(batch.global_samples, *round))
            : "Lower batch.micro_samples";
    draft.refuse({"batch.global_samples", std::to_string(batch.global_samples),
                  fmt::format("a multiple of micro_samples {} x data-parallel ranks {} = {}",
                              batch.micro_samples, data, unit.value_or(0)),
                  "every rank runs the same number of whole micro-batches", fix});
    return std::nullopt;
  }
  if (!tokens) {
    draft.refuse({"batch.global_samples", std::to_string(batch.global_samples),
                  "fewer tokens per step than 64 bits count", "", ""});
    return std::nullopt;
  }
  BatchPlan plan{};
  plan.global_samples = batch.global_samples;
  plan.micro_samples = batch.micro_samples;
  plan.sequence_length = batch.sequence_length;
  plan.samples_per_rank = batch.global_samples / data;
  plan.micro_batches = plan.samples_per_rank / batch.micro_samples;
  plan.tokens_per_step = *tokens;
  constexpr int64_t kMostMicroBatches = 65536;
  if (plan.micro_batches > kMostMicroBatches)
    draft.refuse({"batch.micro_samples", std::to_string(batch.micro_samples),
                  fmt::format("at most {} micro-batches per step and rank, this makes {}",
                              kMostMicroBatches, plan.micro_batches),
                  "", "Raise batch.micro_samples"});
  const recipe::Run& run = draft.recipe.run;
  if (run.steps.has_value() == run.tokens.has_value()) {
    draft.refuse({run.steps ? "run.tokens" : "run.steps", run.steps ? "both" : "neither",
                  "exactly one of run.steps and run.tokens", "", ""});
    return std::nullopt;
  }
  // The step that reaches the tokens is the last one.
  plan.total_steps = run.steps ? *run.steps : (*run.tokens - 1) / *tokens + 1;
  return plan;
}

void resolve_lr_schedule(Draft& draft, const BatchPlan& batch) {
  recipe::LrSchedule& lr = draft.recipe.lr_schedule;
  const int64_t per_step = lr.unit == "tokens" ? batch.tokens_per_step : 1;
  const auto product = checked_multiply(batch.total_steps, per_step);
  if (!product) {
    draft.refuse({"run.steps", std::to_string(batch.total_steps), "fewer tokens than 64 bits count",
                  "", ""});
    return;
  }
  const int64_t total = *product;
  if (lr.warmup > total) {
    draft.refuse({"lr_schedule.warmup", fmt::format("{} {}", lr.warmup, lr.unit),
                  fmt::format("at most the run's {} {}", total, lr.unit),
                  "the peak learning rate would never be reached", ""});
    return;
  }
  const int64_t room = total - lr.warmup;
  const bool has_decay = lr.kind != "constant" && lr.kind != "inverse_sqrt";
  if (lr.kind == "wsd" && !lr.decay) {
    draft.refuse({"lr_schedule.decay", "auto", "the length of the last phase", "kind is wsd",
                  fmt::format("Write lr_schedule.decay, up to {} {}", room, lr.unit)});
    return;
  }
  if (has_decay && !lr.decay) {
    // A run that is all warm-up still needs a positive length, which is then never used.
    lr.decay = std::max<int64_t>(room, 1);
    draft.choose("lr_schedule.decay", fmt::format("{} {}", *lr.decay, lr.unit),
                 "from the end of warm-up to the end of the run");
  } else if (lr.kind == "wsd" && *lr.decay > room) {
    draft.refuse({"lr_schedule.decay", fmt::format("{} {}", *lr.decay, lr.unit),
                  fmt::format("at most {} {}, what warm-up leaves of the run", room, lr.unit),
                  "the last phase ends with the run", ""});
  } else if (has_decay && *lr.decay > room) {
    // Legal, since a resume may shorten the run, which keeps the decay of its first start.
    draft.choices.push_back(
        fmt::format("warning: lr_schedule.decay {} {} ends after the run: the last learning "
                    "rate is not reached",
                    *lr.decay, lr.unit));
  }
}

}  // namespace capstan::plan
