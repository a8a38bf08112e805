// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <nlohmann/json.hpp>

#include "capstan/base/bytes.h"
#include "capstan/plan/frozen.h"
#include "capstan/plan/plan.h"
#include "plan/rank_report_internal.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

using Json = nlohmann::ordered_json;

// Counts are whole numbers; those that a double holds exactly are written as such.
Json whole(double value) {
  if (value < 9e15) return static_cast<int64_t>(value);
  return value;
}

Json grid_json(const Grid& grid) {
  const Grid::Sizes& s = grid.sizes();
  return {{"pp", s.pp},
          {"dp_replicate", s.dp_replicate},
          {"dp_shard", s.dp_shard},
          {"cp", s.cp},
          {"tp", s.tp},
          {"ep", s.ep}};
}

Json model_json(const Plan& plan) {
  Json model = Json::parse(to_hf_config(plan.model().shape, plan.precision.master));
  model["family"] = plan.model().shape.family;
  return model;
}

Json parameters_json(const Plan& plan) {
  const ModelPlan& model = plan.model();
  Json groups = Json::object();
  for (const auto& [name, count] : parameter_groups(model.table())) groups[name] = count;
  return {{"total", model.parameters},
          {"trainable", count_trainable(model.table())},
          {"groups", groups}};
}

Json precision_json(const PrecisionPlan& p) {
  Json scale = nullptr;
  if (p.dynamic_loss_scale)
    scale = "dynamic";
  else if (p.loss_scale != 1.0)
    scale = p.loss_scale;
  return {{"compute", name_of(p.compute)},     {"residual", name_of(p.residual)},
          {"master", name_of(p.master)},       {"gradients", name_of(p.gradients)},
          {"reduction", name_of(p.reduction)}, {"loss_scale", scale}};
}

Json batch_json(const BatchPlan& b) {
  return {{"global_samples", b.global_samples},   {"micro_samples", b.micro_samples},
          {"sequence_length", b.sequence_length}, {"samples_per_rank", b.samples_per_rank},
          {"micro_batches", b.micro_batches},     {"tokens_per_step", b.tokens_per_step}};
}

Json run_json(const BatchPlan& b) {
  const auto tokens = checked_multiply(b.total_steps, b.tokens_per_step);
  Json run = {{"total_steps", b.total_steps}, {"total_tokens", nullptr}};
  if (tokens) run["total_tokens"] = *tokens;
  return run;
}

Json flops_json(const Plan& plan) {
  const ForwardFlops& f = plan.flops.forward;
  return {
      {"convention", plan.flops.convention},
      {"per_token", whole(plan.flops.per_token)},
      {"forward",
       {{"linear", whole(f.linear)}, {"attention", whole(f.attention)}, {"head", whole(f.head)}}},
      {"six_n", whole(6.0 * static_cast<double>(plan.model().parameters))}};
}

const char* name_of_part(ActivationTerm::Part part) {
  switch (part) {
    case ActivationTerm::Part::kEmbedding:
      return "embedding";
    case ActivationTerm::Part::kLayer:
      return "layer";
    case ActivationTerm::Part::kHead:
      return "head";
    case ActivationTerm::Part::kLayerWorkspace:
      return "layer_workspace";
    case ActivationTerm::Part::kHeadWorkspace:
      return "head_workspace";
    case ActivationTerm::Part::kBlockInput:
      return "block_input";
    case ActivationTerm::Part::kWeightWork:
      return "weight_work";
    case ActivationTerm::Part::kWaiting:
      return "waiting";
  }
  return "?";
}

Json report_json(const MemoryReport& m) {
  return {{"rank", m.rank},
          {"parameters", m.parameters},
          {"master", m.master},
          {"gradients", m.gradients},
          {"optimizer", m.optimizer},
          {"activations", m.activations},
          {"workspace", m.workspace},
          {"communication", m.communication},
          {"data", m.data},
          {"peak", m.peak()},
          {"saving", m.saving},
          {"run_peak", m.run_peak()},
          {"checkpoint_snapshot", m.checkpoint_snapshot},
          {"device", m.device},
          {"host", m.host},
          {"host_taken", m.host_taken},
          {"needed", m.needed()}};
}

Json memory_json(const Plan& plan) {
  Json terms = Json::array();
  for (const ActivationTerm& term : activation_bytes_of(plan).terms)
    terms.push_back({{"part", name_of_part(term.part)},
                     {"phase", term.phase},
                     {"name", term.name},
                     {"bytes", term.bytes}});
  Json json = report_json(plan.memory);
  json["activation_terms"] = terms;
  return json;
}

Json traffic_json(const Traffic& traffic) {
  Json json = Json::object();
  for (const auto& [key, entry] : traffic)
    json[key] = {{"calls", entry.calls}, {"bytes", entry.bytes}};
  return json;
}

Json ranks_json(const Plan& plan) {
  Json ranks = Json::array();
  for (const RankReport& r : report_ranks(plan))
    ranks.push_back({{"rank", r.rank},
                     {"pp", r.coord.pp},
                     {"blocks", r.blocks},
                     {"parameters", r.parameters},
                     {"flops", whole(r.flops)},
                     {"flops_again", whole(r.flops_again)},
                     {"memory", report_json(r.memory)},
                     {"traffic", traffic_json(r.traffic)}});
  return ranks;
}

Json buckets_json(const Plan& plan, const RankLayout& layout) {
  Json buckets = Json::array();
  for (const std::vector<int>& bucket :
       make_buckets(layout, plan.precision.gradients, plan.bucket_bytes)) {
    Json blocks = Json::array();
    int64_t elements = 0;
    for (const int i : bucket) {
      const FlatBuffer& buffer = layout.buffers[static_cast<size_t>(i)];
      blocks.push_back(buffer.block);
      elements += buffer.numel;
    }
    const auto bytes = elements * static_cast<int64_t>(size_of(plan.precision.gradients));
    buckets.push_back({{"blocks", blocks}, {"bytes", bytes}});
  }
  return buckets;
}

Json schedule_json(const Schedule& schedule) {
  Json ranks = Json::array(), peaks = Json::array();
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    Json list = Json::array();
    for (const Instruction& i : schedule.ranks[rank])
      list.push_back({{"op", name_of(i.op)},
                      {"chunk", i.chunk},
                      {"micro_batch", i.micro_batch},
                      {"peer", i.peer}});
    ranks.push_back(list);
    peaks.push_back(peak_in_flight(schedule, static_cast<int>(rank)));
  }
  return {{"name", schedule.name},
          {"stages", schedule.stages},
          {"micro_batches", schedule.micro_batches},
          {"peak_in_flight", peaks},
          {"ranks", ranks}};
}

Json layout_json(const ModelPlan& model, const RankLayout& layout) {
  Json buffers = Json::array();
  for (const FlatBuffer& buffer : layout.buffers) {
    Json params = Json::array();
    for (const LocalParam& param : buffer.params)
      params.push_back({{"name", model.table()[static_cast<size_t>(param.spec)].name},
                        {"local_shape", param.local_shape},
                        {"flat_begin", param.flat_begin}});
    buffers.push_back({{"block", buffer.block},
                       {"trainable", buffer.trainable},
                       {"shards", buffer.shards},
                       {"numel", buffer.numel},
                       {"params", params}});
  }
  return {{"blocks", layout.blocks}, {"buffers", buffers}};
}

}  // namespace

std::string plan_json(const Plan& plan) {
  const RankLayout layout = plan.model().layout.rank(0);
  Json json;
  json["schema"] = 1;
  json["choices"] = plan.choices;
  json["device"] = plan.resolved.run.device;
  json["world_size"] = plan.grid.size();
  json["threads_per_rank"] = plan.threads_per_rank;
  json["grid"] = grid_json(plan.grid);
  json["zero_stage"] = plan.resolved.parallel.zero.stage;
  json["model"] = model_json(plan);
  json["parameters"] = parameters_json(plan);
  json["precision"] = precision_json(plan.precision);
  json["precision"]["fp8"] = plan.resolved.precision.fp8.scaling;
  json["batch"] = batch_json(plan.batch);
  json["run"] = run_json(plan.batch);
  json["flops"] = flops_json(plan);
  json["memory"] = memory_json(plan);
  json["traffic"] = traffic_json(plan.traffic);
  json["ranks"] = ranks_json(plan);
  json["buckets"] = buckets_json(plan, layout);
  json["schedule"] = schedule_json(plan.schedule);
  json["layout"] = layout_json(plan.model(), layout);
  json["checkpoint_bytes"] = plan.checkpoint_bytes;
  return json.dump(2) + "\n";
}

}  // namespace capstan::plan
