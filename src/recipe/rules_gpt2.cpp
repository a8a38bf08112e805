// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules about what gpt2 and the families like llama have apart.
#include <fmt/format.h>

#include "recipe/rules_internal.h"

namespace capstan::recipe {
namespace {

bool is_gpt2(const RuleContext& c) { return c.recipe().model.family == "gpt2"; }
// Families of users have what they have.
bool is_like_llama(const RuleContext& c) {
  const std::string& family = c.recipe().model.family;
  return family == "llama" || family == "mixtral" || family == "moe";
}

void check_activation(RuleContext& c) {
  if (!c.has({"model.family", "model.hidden_act"})) return;
  Model& m = c.mutable_recipe().model;
  const bool is_gelu = m.hidden_act != "silu";
  if (is_like_llama(c) && is_gelu)
    c.add("model.hidden_act", m.hidden_act, "silu",
          "the feed-forward layer of model.family " + m.family + " is SwiGLU",
          "Leave the key out, or set model.family: gpt2");
  if (!is_gpt2(c) || is_gelu) return;
  if (c.is_written("model.hidden_act")) {
    c.add("model.hidden_act", m.hidden_act, "gelu_pytorch_tanh or gelu",
          "the feed-forward layer of model.family gpt2 has no gate", "Leave the key out");
    return;
  }
  m.hidden_act = "gelu_pytorch_tanh";
  c.derive("model.hidden_act");
}

void check_biases(RuleContext& c) {
  if (!c.has({"model.family", "model.attention_bias"}) || !is_gpt2(c)) return;
  bool& bias = c.mutable_recipe().model.attention_bias;
  if (bias) return;
  if (c.is_written("model.attention_bias")) {
    c.add("model.attention_bias", "false", "true",
          "every projection of model.family gpt2 has a bias", "Leave the key out");
    return;
  }
  bias = true;
  c.derive("model.attention_bias");
}

void check_output_bias(RuleContext& c) {
  if (!c.has({"model.family", "model.attention_bias", "model.attention_output_bias"})) return;
  Model& m = c.mutable_recipe().model;
  if (m.attention_output_bias == m.attention_bias) return;
  if (!c.is_written("model.attention_output_bias")) {
    m.attention_output_bias = m.attention_bias;
    c.derive("model.attention_output_bias");
  } else if (is_gpt2(c) && m.attention_bias) {
    c.add("model.attention_output_bias", "false", "true",
          "every projection of model.family gpt2 has a bias", "Leave the key out");
  }
}

void check_norms(RuleContext& c) {
  if (!c.has({"model.family", "model.layer_norm_eps"}) || !is_like_llama(c)) return;
  const Model& m = c.recipe().model;
  need_default(c, "model.layer_norm_eps", "model.family " + m.family + " has RMSNorm",
               "Set model.rms_norm_eps instead");
}

void check_absent(RuleContext& c) {
  if (!c.has({"model.family"}) || !is_gpt2(c)) return;
  need_default(c, "model.rms_norm_eps", "model.family gpt2 has LayerNorm",
               "Set model.layer_norm_eps instead");
  need_default(c, "model.rope_theta", "model.family gpt2 has learned positions, no rotary ones",
               "Leave the key out");
  need_default(c, "model.sliding_window", "model.family gpt2 attends to the whole row",
               "Leave the key out");
  need_default(c, "model.qk_norm", "model.family gpt2 uses queries and keys as they are",
               "Leave the key out");
}

void check_heads(RuleContext& c) {
  if (!c.has({"model.family", "model.hidden_size", "model.num_attention_heads",
              "model.num_key_value_heads", "model.head_dim"}) ||
      !is_gpt2(c))
    return;
  const Model& m = c.recipe().model;
  if (m.num_key_value_heads.value_or(m.num_attention_heads) != m.num_attention_heads)
    c.add("model.num_key_value_heads", std::to_string(*m.num_key_value_heads),
          fmt::format("auto or {}", m.num_attention_heads),
          "every head of model.family gpt2 has keys and values of its own", "Leave the key out");
  if (m.head_dim && *m.head_dim * m.num_attention_heads != m.hidden_size)
    c.add("model.head_dim", std::to_string(*m.head_dim), "auto: hidden_size / num_attention_heads",
          "the heads of model.family gpt2 are as wide as the residual stream together",
          "Leave the key out");
}

}  // namespace

std::vector<Rule> gpt2_rules() {
  return {
      {"`model.hidden_act` is silu; with `model.family: gpt2` gelu_pytorch_tanh (left out) or "
       "gelu.",
       check_activation},
      {"`model.attention_bias` is true with `model.family: gpt2`; left out, it follows.",
       check_biases},
      {"`model.attention_output_bias` is true with `model.family: gpt2`; left out, it is "
       "`model.attention_bias`.",
       check_output_bias},
      {"`model.layer_norm_eps` is for `model.family: gpt2`.", check_norms},
      {"`model.rms_norm_eps`, `model.rope_theta`, `model.sliding_window` and `model.qk_norm` are "
       "not for `model.family: gpt2`.",
       check_absent},
      {"With `model.family: gpt2`, `model.num_key_value_heads` and `model.head_dim` are what auto "
       "makes of them.",
       check_heads},
  };
}

}  // namespace capstan::recipe
