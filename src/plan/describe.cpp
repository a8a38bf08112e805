// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The plan as a page for people.
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/bytes.h"
#include "capstan/base/text.h"
#include "capstan/plan/experts.h"
#include "capstan/plan/fp8.h"
#include "capstan/plan/frozen.h"
#include "capstan/plan/optimizer_states.h"
#include "capstan/plan/plan.h"
#include "plan/describe_internal.h"

namespace capstan::plan {
namespace {

std::string row(const std::string& title, const std::string& text) {
  return fmt::format("{:<12}{}\n", title, text);
}

// "1 rank", "2 ranks", "3 micro-batches".
std::string counted(int64_t count, const std::string& noun) {
  const bool is_hissing = noun.ends_with("ch");
  return fmt::format("{} {}{}", format_count(count), noun,
                     count == 1   ? ""
                     : is_hissing ? "es"
                                  : "s");
}

std::string describe_model(const Plan& plan) {
  const ModelPlan& model = plan.model();
  const ModelShape& s = model.shape;
  std::string text =
      row("model", fmt::format("{}, {}, hidden {}, feed-forward {}, {} of {}, {}", s.family,
                               counted(s.num_hidden_layers, "layer"), s.hidden_size,
                               s.intermediate_size, counted(s.num_attention_heads, "head"),
                               s.head_dim, counted(s.num_key_value_heads, "key/value head")));
  text += row("", fmt::format("vocabulary {}, positions {}, {}, {} head",
                              format_count(s.vocab_size), format_count(s.max_position_embeddings),
                              s.sliding_window ? fmt::format("window {}", *s.sliding_window)
                                               : "full attention",
                              s.tie_word_embeddings ? "tied" : "untied"));
  if (s.experts.count > 0)
    text += row("", fmt::format("{} of {} features, {} per token{}, {} router",
                                counted(s.experts.count, "expert"), s.experts.intermediate_size,
                                s.experts.per_token,
                                s.experts.shared_intermediate_size > 0 ? " and a shared one" : "",
                                s.experts.router));
  text += row("parameters", format_count(model.parameters));
  if (const int64_t trained = count_trainable(model.table()); trained < model.parameters)
    text += row("", fmt::format("{} of them trained", format_count(trained)));
  if (s.experts.count > 0)
    text += row("", fmt::format("{} of them for one token",
                                format_count(count_active_parameters(s, model.table()))));
  for (const auto& [name, count] : parameter_groups(model.table()))
    text += row("", fmt::format("{:<14}{:>18}  {:5.1f} %", name, format_count(count),
                                100.0 * static_cast<double>(count) /
                                    static_cast<double>(model.parameters)));
  return text;
}

std::string describe_layout(const Plan& plan) {
  const Grid::Sizes& g = plan.grid.sizes();
  const recipe::Parallel& parallel = plan.resolved.parallel;
  const RankLayout layout = plan.model().layout.rank(0);
  const auto buckets = make_buckets(layout, plan.precision.gradients, plan.bucket_bytes);
  std::string text = row(
      "layout", fmt::format("{} on {}: data {} x tensor {} x pipeline {} x context {}, ZeRO {}",
                            counted(plan.grid.size(), "rank"), plan.resolved.run.device,
                            plan.grid.data_parallel_size(), g.tp, g.pp, g.cp, parallel.zero.stage));
  text += row("", fmt::format("{} here, {} each", plan.topology.local_size,
                              counted(plan.threads_per_rank, "thread")));
  text += row("", fmt::format("rank 0 holds {} in {}, {}, {}",
                              counted(static_cast<int64_t>(layout.blocks.size()), "block"),
                              counted(static_cast<int64_t>(layout.buffers.size()), "flat buffer"),
                              counted(layout.numel(), "element"),
                              counted(static_cast<int64_t>(buckets.size()), "gradient bucket")));
  return text;
}

std::string describe_run(const Plan& plan) {
  const BatchPlan& b = plan.batch;
  const PrecisionPlan& p = plan.precision;
  std::string text =
      row("batch",
          fmt::format("{} x {} = {} per step", counted(b.global_samples, "sample"),
                      counted(b.sequence_length, "token"), counted(b.tokens_per_step, "token")));
  text +=
      row("", fmt::format("each rank: {} in {} of {}", counted(b.samples_per_rank, "sample"),
                          counted(b.micro_batches, "micro-batch"), format_count(b.micro_samples)));
  const auto tokens = checked_multiply(b.total_steps, b.tokens_per_step);
  text += row("run", fmt::format("{}, {} tokens", counted(b.total_steps, "step"),
                                 tokens ? format_count(*tokens) : "more than 2^63"));
  text +=
      row("precision",
          fmt::format(
              "compute {}{}, residual {}, master {}, gradients {}{}{}", name_of(p.compute),
              uses_fp8(plan.resolved) ? ", linear layers fp8" : "", name_of(p.residual),
              name_of(p.master), name_of(p.gradients),
              p.reduction == p.gradients ? "" : fmt::format(" summed in {}", name_of(p.reduction)),
              p.dynamic_loss_scale ? ", dynamic loss scale" : ""));
  return text;
}

std::string describe_flops(const Plan& plan) {
  const FlopCount& f = plan.flops;
  const auto share = [&](double part) { return 100 * part / f.forward.total(); };
  const auto six_n = 6.0 * static_cast<double>(plan.model().parameters);
  std::string text =
      row("FLOPs", fmt::format("{:.4g} per token to train = 3 x forward, convention: {}",
                               f.per_token, f.convention));
  text += row(
      "", fmt::format("linear {:.1f} %, attention {:.1f} %, head {:.1f} %", share(f.forward.linear),
                      share(f.forward.attention), share(f.forward.head)));
  text += row("", fmt::format("{:.4g} by 6N (N = all parameters), for comparison", six_n));
  return text;
}

// "exp_avg fp32, exp_avg_sq fp32"; with 8-bit states those of both kinds of parameters.
std::string describe_states(const Plan& plan) {
  const auto list = [&](UpdateKind update) {
    std::string text;
    for (const StateSpec& state :
         optimizer_states(plan.resolved.optimizer, plan.precision.master, update))
      if (state.block == 1)
        text += fmt::format("{}{} {}", text.empty() ? "" : ", ", state.kind, name_of(state.dtype));
    return text;
  };
  int64_t in_blocks = 0;
  for (const ParamSpec& spec : plan.model().table())
    if (spec.update == UpdateKind::kRowBlock) in_blocks += numel(spec.shape);
  if (in_blocks == 0) return list(UpdateKind::kElementwise);
  return fmt::format(
      "{} of {:.1f} % of the parameters, {} of the others", list(UpdateKind::kRowBlock),
      100.0 * static_cast<double>(in_blocks) / static_cast<double>(plan.model().parameters),
      list(UpdateKind::kElementwise));
}

std::string describe_memory(const Plan& plan) {
  const MemoryReport& m = plan.memory;
  const bool on_gpu = plan.resolved.run.device == "cuda";
  std::string text = row(
      "memory", on_gpu ? fmt::format("{} predicted on the GPU of rank 0, {} of tensors at the peak",
                                     format_bytes(m.needed()), format_bytes(m.peak()))
                       : fmt::format("{} predicted peak of rank 0", format_bytes(m.run_peak())));
  const auto add = [&](const char* name, int64_t bytes, const char* what) {
    text += row("", fmt::format("{:<14}{:>12}  {}", name, format_bytes(bytes), what));
  };
  add("parameters", m.parameters, "as the forward reads them");
  add("master", m.master,
      m.master == 0 ? "the parameters are the master" : "weights of the optimizer");
  add("gradients", m.gradients, "");
  add("optimizer", m.optimizer, describe_states(plan).c_str());
  add("activations", m.activations, "kept from forward to backward");
  add("workspace", m.workspace, "largest transient need, exchanges included");
  add("communication", m.communication, "staging of gradient sums between processes");
  add("data", m.data,
      plan.model().shape.family == "gpt2" ? "ids, targets, positions"
                                          : "ids, targets, positions, rotary table");
  if (on_gpu)
    add("device", m.device, "CUDA context, cuBLAS, NCCL, beside graphs: assumed, not measured");
  if (m.host > 0)
    add("on the host", m.host,
        "of the tensors above, by parallel.zero.offload and offload_activations");
  if (m.host_taken > 0)
    add("host memory", m.host_taken,
        m.host > 0 ? "taken for them: pinned in slabs of powers of two, moments, a save's copy"
                   : "for the copy of an asynchronous checkpoint");
  if (m.saving > 0)
    text += row(
        "", fmt::format("{} in a step, {} while {} are copied for a save{}", format_bytes(m.peak()),
                        format_bytes(m.saving), format_bytes(m.checkpoint_snapshot),
                        m.saving < m.peak() + m.checkpoint_snapshot ? " at the end" : ""));
  text += row("checkpoint", fmt::format("{} on disk each", format_bytes(plan.checkpoint_bytes)));
  return text;
}

std::string describe_traffic(const Plan& plan) {
  if (plan.traffic.empty()) return row("traffic", "none: one rank");
  std::string text;
  for (const auto& [key, entry] : plan.traffic)
    text += row(text.empty() ? "traffic" : "",
                fmt::format("{}: {}, {} per step and rank", key, counted(entry.calls, "call"),
                            format_bytes(entry.bytes)));
  return text;
}

std::string indent(const std::string& lines) {
  std::string text;
  for (size_t begin = 0; begin < lines.size();) {
    const size_t end = std::min(lines.find('\n', begin), lines.size());
    text += "  " + lines.substr(begin, end - begin) + "\n";
    begin = end + 1;
  }
  return text;
}

}  // namespace

std::vector<std::pair<std::string, int64_t>> parameter_groups(const std::vector<ParamSpec>& table) {
  static constexpr std::pair<const char*, const char*> kGroups[] = {
      {"embed", "embedding"},  {"wte", "embedding"},   {"wpe", "positions"},
      {"lm_head", "head"},     {"norm", "norms"},      {".ln_", "norms"},
      {"attn", "attention"},   {"expert", "experts"},  {"mlp.gate.", "router"},
      {"moe.gate.", "router"}, {"mlp", "feed-forward"}};
  std::vector<std::pair<std::string, int64_t>> groups;
  for (const ParamSpec& spec : table) {
    const auto* const rule = std::find_if(
        std::begin(kGroups), std::end(kGroups),
        [&](const auto& entry) { return spec.name.find(entry.first) != std::string::npos; });
    const std::string name = rule == std::end(kGroups) ? "other" : rule->second;
    auto it = std::find_if(groups.begin(), groups.end(),
                           [&](const auto& group) { return group.first == name; });
    if (it == groups.end()) it = groups.insert(groups.end(), {name, 0});
    it->second += numel(spec.shape);
  }
  return groups;
}

std::string describe_plan(const Plan& plan) {
  std::string text = row("plan", plan.resolved.run.name);
  text += describe_model(plan) + describe_layout(plan) + describe_run(plan) + describe_flops(plan) +
          describe_memory(plan) + describe_traffic(plan) + describe_ranks(plan);
  text += row("schedule", fmt::format("{}, {}, {}, at most {} in flight", plan.schedule.name,
                                      counted(plan.schedule.stages, "stage"),
                                      counted(plan.schedule.micro_batches, "micro-batch"),
                                      peak_in_flight(plan.schedule, 0)));
  text += indent(draw_schedule(plan.schedule));
  if (!plan.choices.empty()) {
    std::string choices;
    for (const std::string& choice : plan.choices) choices += choice + "\n";
    text += "choices\n" + indent(choices);
  }
  return text;
}

}  // namespace capstan::plan
