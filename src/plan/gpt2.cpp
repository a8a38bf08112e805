// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// docs/design/gpt2.md says how names and layouts compare with Hugging Face's files.
#include "plan/gpt2_internal.h"

#include <cmath>

#include "plan/llama_internal.h"

namespace capstan::plan {
namespace {

// Fuse groups of a layer: weights and biases that one product reads together.
constexpr int kQkvWeights = 0, kQkvBiases = 1;

struct TableBuilder {
  const ModelShape& shape;
  std::vector<ParamSpec> table;

  ParamSpec& add(int block, const std::string& name, Shape dims, const Init& init) {
    ParamSpec spec;
    spec.name = name;
    spec.shape = std::move(dims);
    spec.block = block;
    spec.init = init;
    return table.emplace_back(std::move(spec));
  }

  ParamSpec& matrix(int block, const std::string& name, int64_t rows, int64_t columns) {
    return add(block, name, {rows, columns}, {Init::Kind::kNormal, shape.initializer_range});
  }

  void norm(int block, const std::string& name) {
    add(block, name + ".weight", {shape.hidden_size}, {Init::Kind::kOnes, 0}).decay = false;
    add(block, name + ".bias", {shape.hidden_size}, {Init::Kind::kZeros, 0}).decay = false;
  }

  ParamSpec& bias(int block, const std::string& name, int64_t size) {
    ParamSpec& spec = add(block, name + ".bias", {size}, {Init::Kind::kZeros, 0});
    spec.decay = false;
    return spec;
  }

  // Into features that the tensor axis cuts.
  ParamSpec& column(int block, const std::string& name, int64_t features, const ShardRule& rule) {
    ParamSpec& weight = matrix(block, name + ".weight", features, shape.hidden_size);
    weight.tensor = rule;
    weight.site = Site::kSplit;
    return weight;
  }
  ParamSpec& column_bias(int block, const std::string& name, int64_t features,
                         const ShardRule& rule) {
    ParamSpec& spec = bias(block, name, features);
    spec.tensor = rule;
    spec.site = Site::kSplit;
    return spec;
  }

  // Back to the residual stream: two sums per layer, so that its variance does not grow with them.
  void row(int block, const std::string& name, int64_t features) {
    ParamSpec& weight = matrix(block, name + ".weight", shape.hidden_size, features);
    weight.init.deviation /= std::sqrt(2.0 * static_cast<double>(shape.num_hidden_layers));
    weight.tensor = {ShardRule::Kind::kSplit, 1};
    weight.site = Site::kSplit;
    bias(block, name, shape.hidden_size);
  }

  void layer(int index) {
    const int block = index + 1;
    const std::string prefix = "transformer.h." + std::to_string(index) + ".";
    const int64_t query = shape.num_attention_heads * shape.head_dim;
    const ShardRule heads{ShardRule::Kind::kSplit, 0, 1, shape.num_attention_heads};
    const ShardRule features{ShardRule::Kind::kSplit, 0};
    norm(block, prefix + "ln_1");
    for (const char* part : {"attn.q_proj", "attn.k_proj", "attn.v_proj"})
      column(block, prefix + part, query, heads).fuse_group = kQkvWeights;
    for (const char* part : {"attn.q_proj", "attn.k_proj", "attn.v_proj"})
      column_bias(block, prefix + part, query, heads).fuse_group = kQkvBiases;
    row(block, prefix + "attn.c_proj", query);
    norm(block, prefix + "ln_2");
    column(block, prefix + "mlp.c_fc", shape.intermediate_size, features);
    column_bias(block, prefix + "mlp.c_fc", shape.intermediate_size, features);
    row(block, prefix + "mlp.c_proj", shape.intermediate_size);
  }
};

std::vector<ParamSpec> param_table(const ModelShape& shape) {
  TableBuilder builder{shape, {}};
  const auto vocabulary = [&](int block, const char* name) {
    builder.matrix(block, name, shape.vocab_size, shape.hidden_size).tensor.kind =
        ShardRule::Kind::kVocab;
  };
  vocabulary(0, "transformer.wte.weight");
  // On the residual stream: whole on every rank of the tensor axis.
  builder.matrix(0, "transformer.wpe.weight", shape.max_position_embeddings, shape.hidden_size);
  for (int i = 0; i < shape.num_hidden_layers; ++i) builder.layer(i);
  builder.norm(shape.head_block(), "transformer.ln_f");
  if (!shape.tie_word_embeddings) vocabulary(shape.head_block(), "lm_head.weight");
  return std::move(builder.table);
}

// As llama, without the gate.
ForwardFlops forward_flops(const ModelShape& shape, int64_t sequence_length) {
  ForwardFlops flops = llama_family().forward_flops(shape, sequence_length);
  const double product = 2.0 * static_cast<double>(shape.num_hidden_layers) *
                         static_cast<double>(shape.hidden_size) *
                         static_cast<double>(shape.intermediate_size);
  flops.linear -= product;
  flops.again_mlp -= product;
  return flops;
}

ActivationBytes activation_bytes(const ModelShape& shape, const ActivationQuery& query) {
  return decoder_activation_bytes(
      shape, query,
      {.products = 1, .norm_statistics = 2, .column = "up", .activated = "activation of up"});
}

}  // namespace

FamilyDef gpt2_family() {
  FamilyDef family;
  family.name = "gpt2";
  family.param_table = param_table;
  family.forward_flops = forward_flops;
  family.activation_bytes = activation_bytes;
  family.hf_architecture = "GPT2LMHeadModel";
  family.hf_model_type = "gpt2";
  return family;
}

}  // namespace capstan::plan
