// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules about length, batch, schedule, layout and output.
#include <fmt/format.h>

#include <map>
#include <optional>

#include "capstan/base/bytes.h"
#include "recipe/rules_internal.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

void check_length(RuleContext& c) {
  if (!c.has({"run.steps", "run.tokens"})) return;
  const Run& run = c.recipe().run;
  if (run.steps.has_value() != run.tokens.has_value()) return;
  if (run.steps) {
    c.add("run.tokens", "both run.steps and run.tokens", "exactly one of them", "",
          "Set the other to none");
  } else {
    c.add("run.steps", "neither run.steps nor run.tokens", "exactly one of them", "");
  }
}

void check_batch(RuleContext& c) {
  if (!c.has({"batch.global_samples", "batch.micro_samples"})) return;
  const Batch& b = c.recipe().batch;
  if (b.global_samples % b.micro_samples == 0) return;
  const int64_t below = b.global_samples / b.micro_samples * b.micro_samples;
  const int64_t above = below + b.micro_samples;
  c.add("batch.global_samples", std::to_string(b.global_samples),
        fmt::format("a multiple of batch.micro_samples {}", b.micro_samples), "",
        below > 0 ? fmt::format("Use {} or {}", below, above) : fmt::format("Use {}", above));
}

void check_step_size(RuleContext& c) {
  if (!c.has({"batch.global_samples", "batch.sequence_length"})) return;
  const Batch& b = c.recipe().batch;
  if (b.global_samples <= (int64_t{1} << 50) / b.sequence_length) return;
  c.add("batch.global_samples", std::to_string(b.global_samples),
        "global_samples x sequence_length of at most 2^50", "counts of tokens must fit in 64 bits");
}

// Length of the run in the unit of the schedule.
std::optional<int64_t> run_length(const Recipe& r) {
  const auto step_tokens = checked_multiply(r.batch.global_samples, r.batch.sequence_length);
  if (!step_tokens || *step_tokens <= 0) return std::nullopt;
  if (r.lr_schedule.unit == "steps") {
    if (r.run.steps) return r.run.steps;
    return (*r.run.tokens - 1) / *step_tokens + 1;
  }
  if (r.run.tokens) return r.run.tokens;
  return checked_multiply(*r.run.steps, *step_tokens);
}

std::optional<int64_t> run_length_if_good(RuleContext& c) {
  if (!c.has({"run.steps", "run.tokens", "batch.global_samples", "batch.sequence_length",
              "lr_schedule.unit", "lr_schedule.warmup", "lr_schedule.decay", "lr_schedule.kind"})) {
    return std::nullopt;
  }
  const Run& run = c.recipe().run;
  if (run.steps.has_value() == run.tokens.has_value()) return std::nullopt;
  return run_length(c.recipe());
}

void check_warmup(RuleContext& c) {
  const auto length = run_length_if_good(c);
  const LrSchedule& s = c.recipe().lr_schedule;
  if (!length || s.warmup <= *length) return;
  c.add("lr_schedule.warmup", fmt::format("{} {}", s.warmup, s.unit),
        fmt::format("at most {}", *length), "that is the whole run");
}

void check_decay(RuleContext& c) {
  if (!c.has({"lr_schedule.kind", "lr_schedule.decay"})) return;
  const LrSchedule& s = c.recipe().lr_schedule;
  if (s.kind == "wsd" && !s.decay) {
    c.add("lr_schedule.decay", "auto", "a number of " + s.unit,
          "wsd needs the length of its last phase");
  }
  if ((s.kind == "constant" || s.kind == "inverse_sqrt") && s.decay) {
    c.add("lr_schedule.decay", std::to_string(*s.decay), "auto", s.kind + " has no phase of decay",
          "Leave the key out");
  }
  const auto length = run_length_if_good(c);
  if (s.kind != "wsd" || !s.decay || !length || s.warmup > *length) return;
  if (*s.decay <= *length - s.warmup) return;
  c.add("lr_schedule.decay", fmt::format("{} {}", *s.decay, s.unit),
        fmt::format("at most {}", *length - s.warmup), "warmup and decay must fit in the run");
}

void check_sequence(RuleContext& c) {
  if (!c.has({"parallel.sequence", "parallel.tensor"})) return;
  const Parallel& p = c.recipe().parallel;
  if (!p.sequence || p.tensor > 1) return;
  c.add("parallel.sequence", "true", "false", "it needs parallel.tensor above 1",
        "Set parallel.sequence: false");
}

void check_recompute(RuleContext& c) {
  if (!c.has({"parallel.recompute.mode", "parallel.recompute.parts"})) return;
  const Recompute& r = c.recipe().parallel.recompute;
  if (r.mode == "selective" && r.parts.empty()) {
    c.add("parallel.recompute.parts", "an empty list", "at least one part", "mode is selective");
  }
  if (r.mode != "selective" && !r.parts.empty()) {
    c.add("parallel.recompute.parts", fmt::format("a list of {}", r.parts.size()), "an empty list",
          "only mode selective has parts");
  }
}

// A key that does nothing while another is off must keep its default.
void check_unused(RuleContext& c, const char* key_path, bool is_on, const std::string& why) {
  const Key& key = *find_key(key_path);
  if (is_on || !c.has({key_path})) return;
  const Value value = get_value(key, c.recipe());
  if (value == default_value(key)) return;
  c.add(key_path, format_value(key, value), format_value(key, default_value(key)), why,
        "Leave the key out");
}

void check_switches(RuleContext& c) {
  const Recipe& r = c.recipe();
  if (c.has({"optimizer.spike_skip.sigma"})) {
    check_unused(c, "optimizer.spike_skip.window", r.optimizer.spike_skip.sigma.has_value(),
                 "optimizer.spike_skip.sigma is none, so no step is skipped");
  }
  if (c.has({"optimizer.name"})) {
    const std::string& name = r.optimizer.name;
    check_unused(c, "optimizer.eps", name != "lion" && name != "sophia", name + " takes no root");
    for (const char* key : {"optimizer.sophia.rho", "optimizer.sophia.interval"})
      check_unused(c, key, name == "sophia", "optimizer.name is " + name);
  }
  if (c.has({"optimizer.in_backward"})) {
    check_unused(c, "optimizer.nonfinite_limit", !r.optimizer.in_backward,
                 "with optimizer.in_backward the first non-finite step ends the run");
    check_unused(c, "parallel.bucket_mib", !r.optimizer.in_backward,
                 "with optimizer.in_backward every buffer is summed by itself");
  }
  if (c.has({"metrics.trace.first_step"})) {
    check_unused(c, "metrics.trace.steps", r.metrics.trace.first_step.has_value(),
                 "metrics.trace.first_step is none, so nothing is traced");
  }
  if (c.has({"lr_schedule.kind"})) {
    check_unused(c, "lr_schedule.min_ratio", r.lr_schedule.kind != "constant",
                 "a constant schedule does not fall");
  }
  if (c.has({"precision.fp8.scaling"})) {
    const std::string& scaling = r.precision.fp8.scaling;
    check_unused(c, "precision.fp8.gradients", scaling != "none",
                 "precision.fp8.scaling is none, so nothing is multiplied in fp8");
    check_unused(c, "precision.fp8.history", scaling == "delayed",
                 "only precision.fp8.scaling delayed looks back");
  }
  if (c.has({"data.validation"})) {
    const bool evaluates = !r.data.validation.empty();
    check_unused(c, "eval.interval_steps", evaluates, "data.validation is empty");
    check_unused(c, "eval.samples", evaluates, "data.validation is empty");
  }
}

void check_kept(RuleContext& c) {
  if (!c.has({"checkpoint.interval_steps", "checkpoint.keep_every_steps"})) return;
  const Checkpoint& k = c.recipe().checkpoint;
  if (!k.keep_every_steps) return;
  if (!k.interval_steps) {
    c.add("checkpoint.keep_every_steps", std::to_string(*k.keep_every_steps), "none",
          "checkpoint.interval_steps is none, so these steps are not saved");
  } else if (*k.keep_every_steps % *k.interval_steps != 0) {
    c.add("checkpoint.keep_every_steps", std::to_string(*k.keep_every_steps),
          fmt::format("a multiple of checkpoint.interval_steps {}", *k.interval_steps),
          "other steps are not saved");
  }
}

void check_trace(RuleContext& c) {
  if (!c.has({"metrics.trace.first_step", "run.steps"})) return;
  const Recipe& r = c.recipe();
  if (!r.metrics.trace.first_step || !r.run.steps || *r.metrics.trace.first_step <= *r.run.steps)
    return;
  c.add("metrics.trace.first_step", std::to_string(*r.metrics.trace.first_step),
        fmt::format("at most run.steps {}", *r.run.steps), "the run ends before");
}

void check_validation_names(RuleContext& c) {
  std::map<std::string, size_t> seen;
  const auto& sets = c.recipe().data.validation;
  for (size_t i = 0; i < sets.size(); ++i) {
    const std::string key = fmt::format("data.validation[{}].name", i);
    if (!c.has({key.c_str()})) continue;
    const auto [first, is_new] = seen.emplace(sets[i].name, i);
    if (is_new) continue;
    c.add(key, "'" + sets[i].name + "'", "a name of its own",
          fmt::format("data.validation[{}] has it", first->second));
  }
}

}  // namespace

std::vector<Rule> run_rules() {
  return {
      {"Exactly one of `run.steps` and `run.tokens` is given (the other may be written as none).",
       check_length},
      {"`batch.global_samples` is a multiple of `batch.micro_samples`; plan also divides it among "
       "ranks.",
       check_batch},
      {"A step has at most 2^50 tokens.", check_step_size},
      {"`lr_schedule.warmup` is at most the run.", check_warmup},
      {"`lr_schedule.decay` is required for wsd, where warmup and decay fit in the run; constant "
       "and "
       "inverse_sqrt have none.",
       check_decay},
      {"`parallel.sequence` needs `parallel.tensor` above 1.", check_sequence},
      {"`parallel.recompute.parts` is for mode selective, which needs at least one.",
       check_recompute},
      {"Keys that do nothing keep their default: `optimizer.spike_skip.window` without sigma, "
       "`optimizer.eps` with lion and sophia, `optimizer.sophia` with others, "
       "`optimizer.nonfinite_limit` and `parallel.bucket_mib` with "
       "optimizer.in_backward, `metrics.trace.steps` without first_step, "
       "`lr_schedule.min_ratio` with constant, `eval.*` "
       "without "
       "`data.validation`, `precision.fp8.gradients` without fp8, `precision.fp8.history` without "
       "delayed scaling.",
       check_switches},
      {"`checkpoint.keep_every_steps` is a multiple of `checkpoint.interval_steps`.", check_kept},
      {"`metrics.trace.first_step` lies within `run.steps`.", check_trace},
      {"Names in `data.validation` are unique.", check_validation_names},
  };
}

}  // namespace capstan::recipe
