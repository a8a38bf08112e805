// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What flows between the graphs of blocks. A graph begins at a node that holds no memory and ends
// at its roots, so that what a block hands on lives only as long as somebody reads it.
#pragma once
#include <torch/csrc/autograd/edge.h>

#include <memory>
#include <vector>

#include "capstan/nn/model.h"
#include "capstan/parallel/activation_offload.h"

namespace capstan::engine {

using at::Tensor;
using torch::autograd::Edge;

// The tensors of a BlockIO have places: hidden, residual, then extras by name.
[[nodiscard]] std::vector<Tensor> tensors_of(const nn::BlockIO& io);

// The same numbers without history; requires_grad says whether a gradient is wanted, as one is by
// everything before a block that is run again, which has no graph yet.
[[nodiscard]] nn::BlockIO cut_off(const nn::BlockIO& made, bool is_recomputed);

// The foot of a graph.
struct GraphInput {
  nn::BlockIO io;
  std::vector<Edge> edges;  // by place: where the gradient arrives; invalid: none is wanted
};
[[nodiscard]] GraphInput start_graph(const nn::BlockIO& leaves);
// Where the history of a result begins; invalid where there is none.
[[nodiscard]] Edge root_of(const Tensor& made);
[[nodiscard]] std::vector<Edge> roots_of(const nn::BlockIO& made);  // by place

// The residual stream as it leaves a stage.
[[nodiscard]] nn::BlockIO merged(const nn::BlockIO& made);

// A block's input in host memory, by place.
struct InputOnHost {
  struct Leaf {
    std::shared_ptr<parallel::HostCopy> copy;  // null: undefined
    bool requires_grad = false;
  };
  std::vector<Leaf> leaves;
};
// Leaves nothing in `in` but its names; bring_back undoes it.
[[nodiscard]] InputOnHost put_away(nn::BlockIO& in, parallel::ActivationOffload& offload);
void bring_back(nn::BlockIO& in, InputOnHost host);

}  // namespace capstan::engine
