// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "plan/llama_internal.h"

#include <algorithm>

namespace capstan::plan {
namespace {

// Fuse groups of a layer: weights and biases that one product reads together.
constexpr int kQkvWeights = 0, kGateUpWeights = 1, kQkvBiases = 2;

struct TableBuilder {
  const ModelShape& shape;
  std::vector<ParamSpec> table;

  ParamSpec& add(int block, std::string name, Shape dims) {
    ParamSpec spec;
    spec.name = std::move(name);
    spec.shape = std::move(dims);
    spec.block = block;
    return table.emplace_back(std::move(spec));
  }

  ParamSpec& matrix(int block, const std::string& name, int64_t rows, int64_t columns) {
    ParamSpec& spec = add(block, name, {rows, columns});
    spec.init = {Init::Kind::kNormal, shape.initializer_range};
    return spec;
  }

  void norm(int block, const std::string& name) {
    ParamSpec& spec = add(block, name, {shape.hidden_size});
    spec.init = {Init::Kind::kOnes, 0};
    spec.decay = false;
  }

  // Every rank of the tensor axis applies it to its own heads.
  void head_norm(int block, const std::string& name) {
    norm(block, name);
    table.back().shape = {shape.head_dim};
    table.back().site = Site::kSplit;
  }

  void bias(int block, const std::string& name, int64_t size, const ShardRule& rule) {
    ParamSpec& spec = add(block, name, {size});
    spec.init = {Init::Kind::kZeros, 0};
    spec.decay = false;
    spec.tensor = rule;
    const bool split = rule.kind == ShardRule::Kind::kSplit;
    spec.site = split ? Site::kSplit : Site::kResidual;
    spec.fuse_group = split ? kQkvBiases : -1;
  }

  void vocabulary(int block, const std::string& name) {
    matrix(block, name, shape.vocab_size, shape.hidden_size).tensor.kind = ShardRule::Kind::kVocab;
  }

  void linear(int block, const std::string& name, const Shape& dims, const ShardRule& rule,
              int fuse_group = -1) {
    ParamSpec& spec = matrix(block, name, dims[0], dims[1]);
    spec.tensor = rule;
    spec.site = Site::kSplit;
    spec.fuse_group = fuse_group;
  }

  void layer(int index) {
    const int block = index + 1;
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    const int64_t hidden = shape.hidden_size, ffn = shape.intermediate_size;
    const int64_t query = shape.num_attention_heads * shape.head_dim;
    const int64_t key_value = shape.num_key_value_heads * shape.head_dim;
    const ShardRule rows{ShardRule::Kind::kSplit, 0};
    const ShardRule columns{ShardRule::Kind::kSplit, 1};
    const ShardRule heads{ShardRule::Kind::kSplit, 0, 1, shape.num_key_value_heads};
    norm(block, prefix + "input_layernorm.weight");
    linear(block, attention + "q_proj.weight", {query, hidden}, rows, kQkvWeights);
    linear(block, attention + "k_proj.weight", {key_value, hidden}, heads, kQkvWeights);
    linear(block, attention + "v_proj.weight", {key_value, hidden}, heads, kQkvWeights);
    if (shape.attention_bias) {
      bias(block, attention + "q_proj.bias", query, rows);
      bias(block, attention + "k_proj.bias", key_value, heads);
      bias(block, attention + "v_proj.bias", key_value, heads);
    }
    linear(block, attention + "o_proj.weight", {hidden, query}, columns);
    if (shape.attention_output_bias) bias(block, attention + "o_proj.bias", hidden, ShardRule{});
    if (shape.qk_norm) {
      head_norm(block, attention + "q_norm.weight");
      head_norm(block, attention + "k_norm.weight");
    }
    norm(block, prefix + "post_attention_layernorm.weight");
    linear(block, mlp + "gate_proj.weight", {ffn, hidden}, rows, kGateUpWeights);
    linear(block, mlp + "up_proj.weight", {ffn, hidden}, rows, kGateUpWeights);
    linear(block, mlp + "down_proj.weight", {hidden, ffn}, columns);
  }
};

std::vector<ParamSpec> param_table(const ModelShape& shape) {
  TableBuilder builder{shape, {}};
  builder.vocabulary(0, "model.embed_tokens.weight");
  for (int i = 0; i < shape.num_hidden_layers; ++i) builder.layer(i);
  builder.norm(shape.head_block(), "model.norm.weight");
  if (!shape.tie_word_embeddings) builder.vocabulary(shape.head_block(), "lm_head.weight");
  return std::move(builder.table);
}

// Keys that a query sees on average: positions 1..s see 1..s keys, at most `window` of them.
double mean_keys(int64_t sequence, std::optional<int64_t> window) {
  const auto s = static_cast<double>(sequence);
  const auto w = static_cast<double>(std::min(window.value_or(sequence), sequence));
  return (w * (w + 1) / 2 + (s - w) * w) / s;
}

ForwardFlops forward_flops(const ModelShape& shape, int64_t sequence_length) {
  const auto layers = static_cast<double>(shape.num_hidden_layers);
  const auto hidden = static_cast<double>(shape.hidden_size);
  const auto query = static_cast<double>(shape.num_attention_heads * shape.head_dim);
  const auto key_value = static_cast<double>(shape.num_key_value_heads * shape.head_dim);
  const auto ffn = static_cast<double>(shape.intermediate_size);
  ForwardFlops flops;
  flops.linear = 2 * layers * hidden * (2 * query + 2 * key_value + 3 * ffn);
  flops.attention = layers * 4 * query * mean_keys(sequence_length, shape.sliding_window);
  flops.again_attention = 2 * layers * hidden * (query + 2 * key_value) + flops.attention;
  flops.again_mlp = 2 * layers * hidden * 2 * ffn;
  flops.head = 2 * hidden * static_cast<double>(shape.vocab_size);
  return flops;
}

}  // namespace

FamilyDef llama_family() {
  FamilyDef family;
  family.name = "llama";
  family.param_table = param_table;
  family.forward_flops = forward_flops;
  family.activation_bytes = llama_activation_bytes;
  family.hf_architecture = "LlamaForCausalLM";
  family.hf_model_type = "llama";
  return family;
}

}  // namespace capstan::plan
