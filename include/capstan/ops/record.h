// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// record(): puts one node with a hand-written backward behind results that were computed without
// autograd. Every op of this module is made with it, and so are the collective steps of parallel.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "capstan/param/param.h"

namespace capstan::ops {

using at::Tensor;
using param::Param;
using param::Projection;
using Tensors = std::vector<Tensor>;

// Gets the saved tensors and one gradient per output (undefined where the output was not used);
// returns one gradient, or an undefined tensor, per input. It may capture numbers, Params and
// tensors that are no part of the graph (positions); what belongs to the graph goes through
// `saved`, so that it may be kept elsewhere (keep.h) and is freed after the backward. The gradients
// are the closure's to keep: moved out of the vector and owned alone they may be written in place.
using Backward = std::function<Tensors(const Tensors& saved, Tensors& grads)>;

// Makes an output again from the saved tensors. Nodes that save the output keep nothing of it.
struct Remake {
  size_t output = 0;
  std::function<Tensor(const Tensors& saved)> make;
};

struct NodeSpec {
  const char* name = "";
  Tensors inputs;  // tensors the results are differentiable in; undefined ones are skipped
  std::vector<Param> params;  // weights the backward reads or accumulates into
  Tensors saved;              // may contain inputs, outputs and undefined tensors
  Backward backward;
  Remake remake = {};
};

// Attaches the node to `outputs` (fresh tensors, or detached aliases of inputs). Does nothing when
// gradients are off or nothing requires one. The backward checks that the weights are those of the
// forward.
void record(const Tensors& outputs, NodeSpec node);
Tensor record(const Tensor& output, NodeSpec node);

// True when record() would attach a node: what only a backward needs can be left out otherwise.
[[nodiscard]] bool needs_backward(const Tensors& inputs, const std::vector<Param>& params);

// `gradient` when nobody else can see its memory, else a contiguous copy of it: for backwards that
// work in place.
[[nodiscard]] Tensor own_or_copy(Tensor gradient);

}  // namespace capstan::ops
