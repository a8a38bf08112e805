// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules about shapes and number types.
#include <fmt/format.h>

#include <cstdlib>

#include "recipe/rules_internal.h"

namespace capstan::recipe {
namespace {

// The divisor of `total` closest to `wanted`.
int64_t nearest_divisor(int64_t total, int64_t wanted) {
  int64_t best = 1;
  for (int64_t d = 1; d <= total && d <= 2 * wanted; ++d) {
    if (total % d == 0 && std::llabs(d - wanted) < std::llabs(best - wanted)) best = d;
  }
  return best;
}

void check_heads(RuleContext& c) {
  if (!c.has({"model.hidden_size", "model.num_attention_heads", "model.head_dim"})) return;
  const Model& m = c.recipe().model;
  if (m.head_dim || m.hidden_size % m.num_attention_heads == 0) return;
  c.add("model.num_attention_heads", std::to_string(m.num_attention_heads),
        fmt::format("a divisor of hidden_size {}", m.hidden_size), "model.head_dim is auto",
        fmt::format("Use {}, or set model.head_dim",
                    nearest_divisor(m.hidden_size, m.num_attention_heads)));
}

void check_key_value_heads(RuleContext& c) {
  if (!c.has({"model.num_attention_heads", "model.num_key_value_heads"})) return;
  const Model& m = c.recipe().model;
  const int64_t kv_heads = m.num_key_value_heads.value_or(m.num_attention_heads);
  if (m.num_attention_heads % kv_heads == 0) return;
  c.add("model.num_key_value_heads", std::to_string(kv_heads),
        fmt::format("a divisor of num_attention_heads {}", m.num_attention_heads),
        "query heads share key and value heads evenly",
        fmt::format("Use {}", nearest_divisor(m.num_attention_heads, kv_heads)));
}

void check_head_dim(RuleContext& c) {
  if (!c.has({"model.hidden_size", "model.num_attention_heads", "model.head_dim"})) return;
  const Model& m = c.recipe().model;
  if (!m.head_dim && m.hidden_size % m.num_attention_heads != 0) return;
  const int64_t head_dim = m.head_dim.value_or(m.hidden_size / m.num_attention_heads);
  if (head_dim % 2 == 0 || m.family == "gpt2") return;
  c.add(m.head_dim ? "model.head_dim" : "model.num_attention_heads",
        m.head_dim ? std::to_string(head_dim)
                   : fmt::format("{} (head_dim {})", m.num_attention_heads, head_dim),
        "an even head_dim", "rotary positions turn pairs");
}

void check_positions(RuleContext& c) {
  if (!c.has({"model.max_position_embeddings", "batch.sequence_length"})) return;
  const Recipe& r = c.recipe();
  if (r.batch.sequence_length <= r.model.max_position_embeddings.value_or(r.batch.sequence_length))
    return;
  c.add("batch.sequence_length", std::to_string(r.batch.sequence_length),
        fmt::format("at most {}", *r.model.max_position_embeddings),
        "model.max_position_embeddings is the longest sequence");
}

void check_vocabulary(RuleContext& c) {
  if (!c.has({"model.vocab_size", "data.tokenizer"})) return;
  const Recipe& r = c.recipe();
  if (r.model.vocab_size || r.data.tokenizer) return;
  c.add("model.vocab_size", "auto", "a number",
        "data.tokenizer is none, so nothing gives the size");
}

// One of master and gradients: fp64 exactly when compute is.
void check_wide(RuleContext& c, const std::string& key, std::string& value) {
  if (!c.has({"precision.compute", key.c_str()})) return;
  const std::string& compute = c.recipe().precision.compute;
  const std::string need = compute == "fp64" ? "fp64" : "fp32";
  if (value == need) return;
  if (!c.is_written(key)) {
    value = need;
    c.derive(key);
    return;
  }
  c.add(key, value, need, "precision.compute is " + compute, "Leave the key out");
}

void check_master(RuleContext& c) {
  check_wide(c, "precision.master", c.mutable_recipe().precision.master);
  check_wide(c, "precision.gradients", c.mutable_recipe().precision.gradients);
}

void check_residual(RuleContext& c) {
  if (!c.has({"precision.compute", "precision.residual"})) return;
  const Precision& p = c.recipe().precision;
  if (p.residual == "auto" || p.residual == p.compute) return;
  const bool compute_is_16_bit = p.compute != "fp32" && p.compute != "fp64";
  if (p.residual == "fp32" && compute_is_16_bit) return;
  if (p.residual == "bf16" && p.compute == "auto") return;
  const std::string need = p.compute == "auto" ? "auto, fp32 or bf16"
                           : compute_is_16_bit ? "auto, fp32 or " + p.compute
                                               : "auto or " + p.compute;
  c.add("precision.residual", p.residual, need, "precision.compute is " + p.compute);
}

void check_loss_scale(RuleContext& c) {
  if (!c.has({"precision.compute", "precision.loss_scale"})) return;
  const Precision& p = c.recipe().precision;
  if (!p.loss_scale || p.compute == "fp16") return;
  c.add("precision.loss_scale", fmt::format("{}", *p.loss_scale), "dynamic",
        "only precision.compute fp16 scales the loss", "Leave the key out");
}

void check_moments(RuleContext& c) {
  if (!c.has({"optimizer.moments", "precision.compute"})) return;
  const std::string& moments = c.recipe().optimizer.moments;
  if (moments == "auto" || c.recipe().precision.compute != "fp64") return;
  c.add("optimizer.moments", moments, "auto", "precision.compute is fp64", "Leave the key out");
}

}  // namespace

std::vector<Rule> model_rules() {
  return {
      {"`model.hidden_size` is a multiple of `model.num_attention_heads`, unless `model.head_dim` "
       "is given.",
       check_heads},
      {"`model.num_attention_heads` is a multiple of `model.num_key_value_heads`.",
       check_key_value_heads},
      {"`model.head_dim` is even, since rotary positions turn pairs; any with `model.family: "
       "gpt2`.",
       check_head_dim},
      {"`batch.sequence_length` is at most `model.max_position_embeddings`.", check_positions},
      {"`model.vocab_size: auto` needs a `data.tokenizer`.", check_vocabulary},
      {"`precision.master` and `precision.gradients` are fp64 exactly when `precision.compute` is; "
       "left out, "
       "they follow it.",
       check_master},
      {"`precision.residual` is auto, fp32 with a 16-bit compute type, or the compute type.",
       check_residual},
      {"`optimizer.moments` is auto with `precision.compute: fp64`.", check_moments},
      {"`precision.loss_scale` is a number only with `precision.compute: fp16`.", check_loss_scale},
  };
}

}  // namespace capstan::recipe
