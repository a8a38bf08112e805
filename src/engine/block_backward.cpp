// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/block_backward_internal.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

namespace capstan::engine {
namespace {

namespace autograd = torch::autograd;

// Stands above the roots and hands their gradients on, owning them until then. The autograd engine
// would keep a reference of its own to gradients passed to it as arguments.
struct HandOver : autograd::Node {
  autograd::variable_list gradients;
  autograd::variable_list apply(autograd::variable_list&&) override { return std::move(gradients); }
  std::string name() const override { return "HandOver"; }
};

// Where the gradient of a leaf arrives; an edge to nowhere when no graph reaches it.
autograd::Edge edge_of(const Tensor& leaf) {
  const auto accumulator = autograd::impl::try_get_grad_accumulator(leaf);
  if (accumulator) return {accumulator, static_cast<uint32_t>(leaf.output_nr())};
  const auto unreachable = std::shared_ptr<HandOver>(new HandOver, autograd::deleteNode);
  return {unreachable, 0};
}

}  // namespace

void Roots::add(Tensor tensor, Tensor gradient) {
  if (!tensor.defined() || !tensor.requires_grad() || !gradient.defined()) return;
  tensors.push_back(std::move(tensor));
  gradients.push_back(std::move(gradient));
}

std::vector<Tensor> differentiate(Roots roots, const std::vector<Tensor>& leaves,
                                  const std::vector<Tensor>& anchors) {
  if (roots.tensors.empty()) return std::vector<Tensor>(leaves.size());
  const auto top = std::shared_ptr<HandOver>(new HandOver, autograd::deleteNode);
  autograd::edge_list edges;
  for (const Tensor& tensor : roots.tensors) edges.push_back(autograd::impl::gradient_edge(tensor));
  top->set_next_edges(std::move(edges));
  top->gradients = std::move(roots.gradients);
  roots.tensors.clear();
  const Tensor signal = at::zeros({});  // the engine starts a node by a gradient
  top->add_input_metadata(signal);

  autograd::edge_list wanted;
  for (const Tensor& leaf : leaves) wanted.push_back(edge_of(leaf));
  for (const Tensor& anchor : anchors) wanted.push_back(edge_of(anchor));
  if (wanted.empty()) return {};
  auto results = autograd::Engine::get_default_engine().execute(
      {{top, 0}}, {signal}, /*keep_graph=*/false, /*create_graph=*/false,
      /*accumulate_grad=*/false, wanted);
  results.resize(leaves.size());
  return results;
}

}  // namespace capstan::engine
