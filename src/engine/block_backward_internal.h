// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Backward through the graph of one block.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace capstan::engine {

using at::Tensor;

// What a block made, with the gradients that came in for it.
struct Roots {
  std::vector<Tensor> tensors, gradients;
  // Leaves out what has no gradient or needs none.
  void add(Tensor tensor, Tensor gradient);
};

// Gradients of `leaves`, undefined where the roots do not depend on one. Parameters get theirs
// through their stores: autograd visits every op with one of `anchors`. Consumes the roots: their
// memory is released as soon as the graph allows, and a gradient that nobody else holds reaches the
// first op alone, so that it may be written in place.
[[nodiscard]] std::vector<Tensor> differentiate(Roots roots, const std::vector<Tensor>& leaves,
                                                const std::vector<Tensor>& anchors);

}  // namespace capstan::engine
