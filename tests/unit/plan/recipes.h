// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A small recipe and a machine that the tests of plan share.
#pragma once
#include <string>
#include <vector>

#include "capstan/plan/plan.h"
#include "capstan/recipe/load.h"

namespace capstan::plan::testing {

inline constexpr const char* kRecipe = R"(version: 1
run:
  name: tiny
  steps: 100
model:
  hidden_size: 256
  intermediate_size: 704
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  tie_word_embeddings: true
data:
  tokenizer: data/tok
  train:
    - {path: data/train}
batch:
  global_samples: 8
  micro_samples: 4
  sequence_length: 256
optimizer:
  lr: 3.0e-3
lr_schedule:
  warmup: 10
)";

inline recipe::Resolved resolved(const std::vector<std::string>& overrides = {}) {
  return recipe::parse_recipe(kRecipe, "tiny.yaml", overrides);
}

inline Topology machine(int ranks, int cores = 2) {
  Topology topology;
  topology.world_size = ranks;
  topology.local_size = ranks;
  topology.physical_cores = cores;
  topology.memory_bytes = int64_t{16} << 30;
  return topology;
}

inline Plan plan_of(const recipe::Resolved& recipe, const Topology& topology) {
  return make_plan(recipe, topology, {.tokenizer_vocab_size = 8192});
}

// Why a plan is refused; nothing if it is not.
inline std::vector<recipe::Problem> problems_of(const recipe::Resolved& recipe,
                                                const Topology& topology,
                                                const PlanInputs& inputs = {
                                                    .tokenizer_vocab_size = 8192}) {
  try {
    (void)make_plan(recipe, topology, inputs);
  } catch (const recipe::RecipeError& e) {
    return e.problems();
  }
  return {};
}

}  // namespace capstan::plan::testing
