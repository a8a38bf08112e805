// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <string>

#include "capstan/base/check.h"
#include "engine/block_io_internal.h"

namespace capstan::engine {
namespace {

namespace autograd = torch::autograd;

std::vector<Tensor*> slots_of(nn::BlockIO& io) {
  std::vector<Tensor*> slots{&io.hidden_BTD, &io.residual_BTD};
  for (auto& [name, tensor] : io.extras) slots.push_back(&tensor);
  return slots;
}

Tensor as_leaf(const Tensor& made, bool is_recomputed) {
  if (!made.defined()) return made;
  return made.detach().set_requires_grad(made.requires_grad() || is_recomputed);
}

// Gradients are captured where they would enter it; it never runs.
struct Foot : autograd::Node {
  autograd::variable_list apply(autograd::variable_list&&) override { return {}; }
  std::string name() const override { return "Foot"; }
};

}  // namespace

std::vector<Tensor> tensors_of(const nn::BlockIO& io) {
  std::vector<Tensor> tensors{io.hidden_BTD, io.residual_BTD};
  for (const auto& [name, tensor] : io.extras) tensors.push_back(tensor);
  return tensors;
}

nn::BlockIO cut_off(const nn::BlockIO& made, bool is_recomputed) {
  nn::BlockIO leaves = made;
  for (Tensor* slot : slots_of(leaves)) *slot = as_leaf(*slot, is_recomputed);
  return leaves;
}

GraphInput start_graph(const nn::BlockIO& leaves) {
  GraphInput input{leaves, {}};
  const auto foot = std::shared_ptr<Foot>(new Foot, autograd::deleteNode);
  for (Tensor* slot : slots_of(input.io)) {
    input.edges.emplace_back();
    if (!slot->defined()) continue;
    const bool wanted = slot->requires_grad();
    *slot = slot->detach();
    if (!wanted) continue;
    autograd::set_history(*slot, foot);
    input.edges.back() = {foot, static_cast<uint32_t>(slot->output_nr())};
  }
  return input;
}

Edge root_of(const Tensor& made) {
  const bool has_history = made.defined() && made.requires_grad();
  return has_history ? autograd::impl::gradient_edge(made) : Edge();
}

std::vector<Edge> roots_of(const nn::BlockIO& made) {
  std::vector<Edge> roots;
  for (const Tensor& tensor : tensors_of(made)) roots.push_back(root_of(tensor));
  return roots;
}

nn::BlockIO merged(const nn::BlockIO& made) {
  CAPSTAN_CHECK(made.extras.empty(), "named extras do not travel between pipeline stages");
  if (!made.hidden_BTD.defined()) return made;
  return {
      .hidden_BTD = {},
      .residual_BTD = made.residual_BTD.add(made.hidden_BTD).to(made.residual_BTD.scalar_type()),
      .extras = {}};
}

InputOnHost put_away(nn::BlockIO& in, parallel::ActivationOffload& offload) {
  InputOnHost host;
  for (Tensor* slot : slots_of(in)) {
    InputOnHost::Leaf& leaf = host.leaves.emplace_back();
    if (!slot->defined()) continue;
    leaf = {offload.copy(*slot), slot->requires_grad()};
    *slot = Tensor();
  }
  return host;
}

void bring_back(nn::BlockIO& in, InputOnHost host) {
  const auto slots = slots_of(in);
  for (size_t i = 0; i < host.leaves.size(); ++i) {
    const InputOnHost::Leaf& leaf = host.leaves[i];
    if (leaf.copy) *slots[i] = leaf.copy->get().detach().set_requires_grad(leaf.requires_grad);
  }
}

}  // namespace capstan::engine
