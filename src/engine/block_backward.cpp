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

// An edge that no graph reaches.
autograd::Edge nowhere() {
  return {std::shared_ptr<HandOver>(new HandOver, autograd::deleteNode), 0};
}

// Where the gradient of an anchor arrives.
autograd::Edge edge_of(const Tensor& anchor) {
  const auto accumulator = autograd::impl::try_get_grad_accumulator(anchor);
  if (!accumulator) return nowhere();
  return {accumulator, static_cast<uint32_t>(anchor.output_nr())};
}

}  // namespace

void Roots::add(autograd::Edge edge, Tensor gradient) {
  if (!edge.is_valid() || !gradient.defined()) return;
  edges.push_back(std::move(edge));
  gradients.push_back(std::move(gradient));
}

std::vector<Tensor> differentiate(Roots roots, const std::vector<autograd::Edge>& inputs,
                                  const std::vector<Tensor>& anchors) {
  if (roots.edges.empty()) return std::vector<Tensor>(inputs.size());
  const auto top = std::shared_ptr<HandOver>(new HandOver, autograd::deleteNode);
  top->set_next_edges(std::move(roots.edges));
  top->gradients = std::move(roots.gradients);
  const Tensor signal = at::zeros({});  // the engine starts a node by a gradient
  top->add_input_metadata(signal);

  autograd::edge_list wanted;
  for (const auto& input : inputs) wanted.push_back(input.is_valid() ? input : nowhere());
  for (const Tensor& anchor : anchors) wanted.push_back(edge_of(anchor));
  if (wanted.empty()) return {};
  auto results = autograd::Engine::get_default_engine().execute(
      {{top, 0}}, {signal}, /*keep_graph=*/false, /*create_graph=*/false,
      /*accumulate_grad=*/false, wanted);
  results.resize(inputs.size());
  return results;
}

}  // namespace capstan::engine
