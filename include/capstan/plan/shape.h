// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The shape of a decoder model. Key names are those of a Hugging Face config.json; every value is
// resolved (no auto). vocab_size is the canonical size, without local padding.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace capstan::plan {

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
  double rope_theta = 10000.0;
  std::optional<int64_t> sliding_window;  // keys seen, own position included
  bool attention_bias = false;
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;

  // Blocks in order: embedding 0, layer i is block i + 1, head last.
  [[nodiscard]] int num_blocks() const { return static_cast<int>(num_hidden_layers) + 2; }
  [[nodiscard]] int head_block() const { return num_blocks() - 1; }
};

}  // namespace capstan::plan
