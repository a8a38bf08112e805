// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The shape of a decoder model. Key names are those of a Hugging Face config.json; every value is
// resolved (no auto). vocab_size is the canonical size, without local padding.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace capstan::plan {

// The experts that take the place of every layer's MLP. docs/design/moe.md has the formulas.
struct ExpertShape {
  int64_t count = 0;  // 0: a dense model
  int64_t per_token = 0;
  int64_t intermediate_size = 0;         // of one expert
  int64_t shared_intermediate_size = 0;  // of the expert that sees every token; 0: there is none
  bool shared_gate = false;              // its output is scaled by sigmoid(x w)
  std::string router = "softmax";        // softmax | sigmoid
  bool normalize_weights = true;         // weights of the chosen experts are scaled to sum 1
  int64_t groups = 1, groups_per_token = 1;  // consecutive experts; choice is limited to groups
  double scaling = 1;                        // of the weights, last
  // Of training only.
  double auxiliary_loss = 0;                 // coefficient
  std::string auxiliary_scope = "sequence";  // sequence | global
  double z_loss = 0;                         // coefficient
  double bias_update_rate = 0;               // 0: no balancing by bias
  std::optional<double> capacity_factor;     // none: no token is dropped

  [[nodiscard]] bool keeps_state() const {
    return bias_update_rate > 0 || (auxiliary_loss > 0 && auxiliary_scope == "global");
  }
  bool operator==(const ExpertShape&) const = default;
};

struct ModelShape {
  std::string family = "llama";
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  std::string hidden_act = "silu";
  double rms_norm_eps = 1e-5;
  double layer_norm_eps = 1e-5;  // gpt2
  double rope_theta = 10000.0;
  std::optional<int64_t> sliding_window;  // keys seen, own position included
  bool attention_bias = false;            // of the query, key and value projections
  bool attention_output_bias = false;     // of the output projection
  bool qk_norm = false;                   // RMSNorm of each query and key head before RoPE
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;
  ExpertShape experts;

  // Blocks in order: embedding 0, layer i is block i + 1, head last.
  [[nodiscard]] int num_blocks() const { return static_cast<int>(num_hidden_layers) + 2; }
  [[nodiscard]] int head_block() const { return num_blocks() - 1; }
};

}  // namespace capstan::plan
