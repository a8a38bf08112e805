// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "plan/moe_internal.h"

#include <algorithm>
#include <cmath>

#include "capstan/base/check.h"
#include "capstan/plan/experts.h"
#include "plan/llama_internal.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {
namespace {

// Fuse groups of an expert layer begin where those of llama end.
constexpr int kSharedGateUp = 8, kFirstExpert = 16;

bool is_dense_mlp(const ParamSpec& spec) { return spec.name.find(".mlp.") != std::string::npos; }

// The parameters in the place of one layer's MLP.
struct LayerTable {
  const ModelShape& shape;
  int layer;
  std::vector<ParamSpec>& table;

  ParamSpec& add(const std::string& name, int64_t rows, int64_t columns) {
    ParamSpec spec;
    spec.name = "model.layers." + std::to_string(layer) + "." + name + ".weight";
    spec.shape = {rows, columns};
    spec.init = {Init::Kind::kNormal, shape.initializer_range};
    spec.block = layer + 1;
    return table.emplace_back(std::move(spec));
  }

  void expert(const ExpertNames& names, int number) {
    const int64_t ffn = shape.experts.intermediate_size, hidden = shape.hidden_size;
    const auto part = [&](const std::string& name, int64_t rows, int64_t columns) -> ParamSpec& {
      ParamSpec& spec = add(names.of(number, name), rows, columns);
      spec.expert = number;
      spec.num_experts = static_cast<int>(shape.experts.count);
      spec.site = Site::kSplit;
      return spec;
    };
    part(names.gate, ffn, hidden).fuse_group = kFirstExpert + number;
    part(names.up, ffn, hidden).fuse_group = kFirstExpert + number;
    part(names.down, hidden, ffn);
  }

  // An MLP like llama's, cut over the tensor axis.
  void shared_expert(const ExpertNames& names) {
    const int64_t ffn = shape.experts.shared_intermediate_size, hidden = shape.hidden_size;
    const auto part = [&](const std::string& name, int dim, const Shape& dims) -> ParamSpec& {
      ParamSpec& spec = add(names.shared + name, dims[0], dims[1]);
      spec.tensor = {ShardRule::Kind::kSplit, dim};
      spec.site = Site::kSplit;
      return spec;
    };
    part("gate_proj", 0, {ffn, hidden}).fuse_group = kSharedGateUp;
    part("up_proj", 0, {ffn, hidden}).fuse_group = kSharedGateUp;
    part("down_proj", 1, {hidden, ffn});
    if (shape.experts.shared_gate) add(names.shared_gate, 1, hidden);  // acts on the stream
  }

  void mlp(const ExpertNames& names) {
    // Every rank of the tensor axis routes other tokens, so the router's gradient is partial there.
    add(names.router, shape.experts.count, shape.hidden_size).site = Site::kSplit;
    for (int e = 0; e < shape.experts.count; ++e) expert(names, e);
    if (shape.experts.shared_intermediate_size > 0) shared_expert(names);
  }
};

std::vector<ParamSpec> param_table(const ModelShape& shape) {
  CAPSTAN_CHECK(shape.experts.count > 0, "family {} without experts", shape.family);
  const ExpertNames& names = expert_names(shape.family);
  std::vector<ParamSpec> table;
  for (ParamSpec& spec : llama_family().param_table(shape)) {
    if (!is_dense_mlp(spec)) {
      table.push_back(std::move(spec));
    } else if (spec.name.ends_with("gate_proj.weight")) {
      LayerTable{shape, spec.block - 1, table}.mlp(names);
    }
  }
  return table;
}

ModelShape without_mlp(const ModelShape& shape) {
  ModelShape rest = shape;
  rest.intermediate_size = 0;
  return rest;
}

// Of the experts that a token meets.
ForwardFlops forward_flops(const ModelShape& shape, int64_t sequence_length) {
  ForwardFlops flops = llama_family().forward_flops(without_mlp(shape), sequence_length);
  const ExpertShape& e = shape.experts;
  const double features =
      3.0 * static_cast<double>(e.per_token) * static_cast<double>(e.intermediate_size) +
      3.0 * static_cast<double>(e.shared_intermediate_size) + static_cast<double>(e.count) +
      (e.shared_gate ? 1.0 : 0.0);
  flops.again_mlp = 2.0 * static_cast<double>(shape.num_hidden_layers) *
                    static_cast<double>(shape.hidden_size) * features;
  flops.linear += flops.again_mlp;
  return flops;
}

FamilyDef family_of(const char* name, const char* architecture, const char* type) {
  FamilyDef family;
  family.name = name;
  family.param_table = param_table;
  family.forward_flops = forward_flops;
  family.activation_bytes = moe_activation_bytes;
  family.hf_architecture = architecture;
  family.hf_model_type = type;
  return family;
}

}  // namespace

const ExpertNames& expert_names(const std::string& family) {
  static const ExpertNames mixtral{.router = "block_sparse_moe.gate",
                                   .expert = "block_sparse_moe.experts.",
                                   .gate = "w1",
                                   .up = "w3",
                                   .down = "w2",
                                   .shared = "block_sparse_moe.shared_expert.",
                                   .shared_gate = "block_sparse_moe.shared_expert_gate",
                                   .router_bias = "block_sparse_moe.gate.e_score_correction_bias",
                                   .router_fractions = "block_sparse_moe.gate.previous_fractions"};
  static const ExpertNames general{.router = "mlp.gate",
                                   .expert = "mlp.experts.",
                                   .gate = "gate_proj",
                                   .up = "up_proj",
                                   .down = "down_proj",
                                   .shared = "mlp.shared_expert.",
                                   .shared_gate = "mlp.shared_expert_gate",
                                   .router_bias = "mlp.gate.e_score_correction_bias",
                                   .router_fractions = "mlp.gate.previous_fractions"};
  return family == "mixtral" ? mixtral : general;
}

int64_t expert_capacity(const ExpertShape& experts, int64_t row_tokens) {
  if (!experts.capacity_factor) return row_tokens;
  const double even = static_cast<double>(row_tokens) * static_cast<double>(experts.per_token) /
                      static_cast<double>(experts.count);
  // A product that should be whole may come out a rounding error above.
  const double most = std::ceil(*experts.capacity_factor * even * (1 - 1e-12));
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(most, 1e15)), 1, row_tokens);
}

int64_t expert_room(const ExpertShape& experts, int64_t rows, int64_t row_tokens, int64_t tokens) {
  CAPSTAN_CHECK(experts.capacity_factor.has_value(), "room for experts without a capacity");
  return std::min(saturating_multiply(rows, expert_capacity(experts, row_tokens)), tokens);
}

int64_t own_expert_room(const ExpertShape& experts, int64_t rows, int64_t row_tokens,
                        int64_t tokens) {
  constexpr int64_t kMostPadding = 16;  // a part of the choices
  if (!experts.capacity_factor) return 0;
  const int64_t room = expert_room(experts, rows, row_tokens, tokens);
  const int64_t choices = saturating_multiply(tokens, experts.per_token);
  const bool is_cheap =
      saturating_multiply(room, experts.count) - choices <= choices / kMostPadding;
  return is_cheap ? room : 0;
}

int64_t count_active_parameters(const ModelShape& shape, const std::vector<ParamSpec>& table) {
  int64_t count = 0, experts = 0;
  for (const ParamSpec& spec : table) (spec.expert >= 0 ? experts : count) += numel(spec.shape);
  if (experts > 0) count += experts / shape.experts.count * shape.experts.per_token;
  return count;
}

ExpertExchange expert_exchange(const ModelShape& shape, int ep, int64_t tokens, DType compute,
                               bool recomputed) {
  ExpertExchange exchange;
  if (ep <= 1 || shape.experts.count == 0) return exchange;
  const int64_t forwards = recomputed ? 2 : 1;
  const int64_t row =
      saturating_multiply(shape.hidden_size, static_cast<int64_t>(size_of(compute)));
  const int64_t local = shape.experts.count / ep;
  exchange.calls = 2 * (forwards + 1);
  exchange.rows_out = saturating_multiply(tokens, shape.experts.per_token);
  // Every token of every rank may choose as many of the experts here as it chooses at all.
  exchange.rows_back_most = saturating_multiply(saturating_multiply(tokens, ep),
                                                std::min(shape.experts.per_token, local));
  const int64_t out = saturating_multiply(exchange.rows_out, row) * (forwards + 1);
  const bool drops = shape.experts.capacity_factor.has_value();
  exchange.bytes_least = drops ? 0 : out;
  exchange.bytes_most = out + saturating_multiply(exchange.rows_back_most, row) * (forwards + 1);
  exchange.group_bytes = saturating_multiply(2 * out, ep);
  return exchange;
}

FamilyDef mixtral_family() { return family_of("mixtral", "MixtralForCausalLM", "mixtral"); }
FamilyDef moe_family() { return family_of("moe", "Qwen2MoeForCausalLM", "qwen2_moe"); }

}  // namespace capstan::plan
