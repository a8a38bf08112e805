// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Model shapes that the tests of plan share.
#pragma once
#include "capstan/plan/family.h"

namespace capstan::plan::testing {

inline ModelShape quickstart_shape() {
  ModelShape shape;
  shape.vocab_size = 8192;
  shape.hidden_size = 256;
  shape.intermediate_size = 704;
  shape.num_hidden_layers = 4;
  shape.num_attention_heads = 4;
  shape.num_key_value_heads = 2;
  shape.head_dim = 64;
  shape.max_position_embeddings = 256;
  shape.tie_word_embeddings = true;
  return shape;
}

inline ModelShape llama3_8b_shape() {
  ModelShape shape;
  shape.vocab_size = 128256;
  shape.hidden_size = 4096;
  shape.intermediate_size = 14336;
  shape.num_hidden_layers = 32;
  shape.num_attention_heads = 32;
  shape.num_key_value_heads = 8;
  shape.head_dim = 128;
  shape.max_position_embeddings = 8192;
  shape.rope_theta = 500000;
  return shape;
}

inline ModelShape tiny_shape() {
  ModelShape shape;
  shape.vocab_size = 97;
  shape.hidden_size = 12;
  shape.intermediate_size = 24;
  shape.num_hidden_layers = 3;
  shape.num_attention_heads = 8;
  shape.num_key_value_heads = 2;
  shape.head_dim = 2;
  shape.max_position_embeddings = 16;
  return shape;
}

inline std::vector<ParamSpec> table_of(const ModelShape& shape) {
  return find_family(shape.family).param_table(shape);
}

inline int index_of(const std::vector<ParamSpec>& table, const std::string& name) {
  for (size_t i = 0; i < table.size(); ++i)
    if (table[i].name == name) return static_cast<int>(i);
  return -1;
}

}  // namespace capstan::plan::testing
