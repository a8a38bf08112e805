// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// GPT-2's spelling of config.json.
#include <utility>

#include "capstan/base/bytes.h"
#include "plan/gpt2_internal.h"

namespace capstan::plan {
namespace {

using json::Json;

constexpr std::pair<const char*, const char*> kNames[] = {
    {"n_embd", "hidden_size"},
    {"n_layer", "num_hidden_layers"},
    {"n_head", "num_attention_heads"},
    {"n_inner", "intermediate_size"},
    {"n_positions", "max_position_embeddings"},
    {"activation_function", "hidden_act"},
    {"layer_norm_epsilon", "layer_norm_eps"}};

}  // namespace

// Files of this program hold q, k, v apart and no matrix transposed (docs/design/gpt2.md): the
// model type makes other readers refuse instead of computing something else.
std::string to_gpt2_config(const ModelShape& shape, const std::string& dtype) {
  nlohmann::ordered_json config;
  config["architectures"] = {"CapstanGPT2LMHeadModel"};
  config["model_type"] = "capstan_gpt2";
  config["vocab_size"] = shape.vocab_size;
  config["n_embd"] = shape.hidden_size;
  config["n_inner"] = shape.intermediate_size;
  config["n_layer"] = shape.num_hidden_layers;
  config["n_head"] = shape.num_attention_heads;
  config["n_positions"] = shape.max_position_embeddings;
  config["activation_function"] = shape.hidden_act;
  config["layer_norm_epsilon"] = shape.layer_norm_eps;
  for (const char* dropout : {"attn_pdrop", "embd_pdrop", "resid_pdrop"}) config[dropout] = 0.0;
  config["scale_attn_weights"] = true;
  config["tie_word_embeddings"] = shape.tie_word_embeddings;
  config["initializer_range"] = shape.initializer_range;
  config["torch_dtype"] = dtype;
  config["use_cache"] = true;
  return config.dump(2) + "\n";
}

Json from_gpt2_keys(const Json& config) {
  Json common = config;
  for (const auto& [own, shared] : kNames)
    if (const auto it = config.find(own); it != config.end() && !it->is_null())
      common[shared] = *it;
  const auto width = common.find("hidden_size");
  const bool has_inner =
      common.contains("intermediate_size") && !common["intermediate_size"].is_null();
  if (!has_inner && width != common.end() && width->is_number_integer())
    if (const auto inner = checked_multiply(4, width->get<int64_t>()))
      common["intermediate_size"] = *inner;
  const auto act = common.find("hidden_act");
  if (act == common.end() || act->is_null() || *act == "gelu_new")
    common["hidden_act"] = "gelu_pytorch_tanh";  // the same function
  if (!common.contains("tie_word_embeddings")) common["tie_word_embeddings"] = true;
  return common;
}

}  // namespace capstan::plan
