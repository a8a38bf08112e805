// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A small Llama's parameters in flat buffers.
#pragma once
#include <ATen/ATen.h>

#include <memory>
#include <vector>

#include "capstan/parallel/flat_store.h"
#include "capstan/plan/family.h"
#include "capstan/plan/frozen.h"

namespace capstan::parallel::testing {

struct SmallModel {
  std::vector<plan::ParamSpec> table;
  plan::RankLayout layout;
  StorageTypes types{at::kDouble, at::kDouble, at::kDouble};

  explicit SmallModel(const std::vector<int>& frozen_blocks = {}) {
    plan::ModelShape shape;
    shape.vocab_size = 33;
    shape.hidden_size = 12;
    shape.intermediate_size = 20;
    shape.num_hidden_layers = 2;
    shape.num_attention_heads = 2;
    shape.num_key_value_heads = 1;
    shape.head_dim = 6;
    shape.max_position_embeddings = 16;
    table = plan::freeze_blocks(plan::find_family("llama").param_table(shape), frozen_blocks);
    plan::LayoutOptions options;
    options.grid = plan::Grid(plan::Grid::Sizes{});
    layout = plan::Layout(shape, table, options).rank(0);
  }

  // The store of a block, with gradient memory of its own.
  [[nodiscard]] std::unique_ptr<FlatStore> store(int block, const at::Tensor& gradient = {}) const {
    for (const auto& buffer : layout.buffers) {
      if (buffer.block != block) continue;
      at::Tensor memory = gradient;
      if (buffer.trainable && !memory.defined())
        memory = at::zeros({buffer.numel}, types.gradients);
      return std::make_unique<FlatStore>(buffer, table, StoreOptions{.types = types}, memory);
    }
    return nullptr;
  }
};

inline int index_of(const FlatStore& store, const std::string& name) {
  return store.find(name).value();
}

}  // namespace capstan::parallel::testing
