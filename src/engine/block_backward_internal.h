// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Backward through the graph of one block.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>

#include <vector>

namespace capstan::engine {

using at::Tensor;

// Where a backward begins, with the gradients that came in.
struct Roots {
  std::vector<torch::autograd::Edge> edges;
  std::vector<Tensor> gradients;
  // Leaves out what has no gradient or no history.
  void add(torch::autograd::Edge edge, Tensor gradient);
};

// Gradients at `inputs` (edges of start_graph, invalid ones included), undefined where the roots do
// not depend on one. Parameters get theirs through their stores: autograd visits every op with one
// of `anchors`. Consumes the roots: their memory is released as soon as the graph allows, and a
// gradient that nobody else holds reaches the first op alone, so that it may be written in place.
[[nodiscard]] std::vector<Tensor> differentiate(Roots roots,
                                                const std::vector<torch::autograd::Edge>& inputs,
                                                const std::vector<Tensor>& anchors);

}  // namespace capstan::engine
