// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/record.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>

#include "capstan/base/check.h"

namespace capstan::ops {
namespace {

using torch::autograd::variable_list;

struct ClosureNode : torch::autograd::Node {
  const char* title = "";
  size_t inputs = 0;
  std::vector<Param> params;
  std::vector<uint64_t> versions;  // of params, at the forward
  std::vector<torch::autograd::SavedVariable> saved;
  Backward backward;
  bool released = false;

  std::string name() const override { return title; }

  void release_variables() override {
    saved.clear();
    backward = {};
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    variable_list result(num_outputs());
    const auto is_defined = [](const Tensor& t) { return t.defined(); };
    if (std::none_of(grads.begin(), grads.end(), is_defined)) return result;
    CAPSTAN_CHECK(!released, "{}: backward ran a second time after its tensors were freed", title);
    for (size_t i = 0; i < params.size(); ++i)
      CAPSTAN_CHECK(params[i].version() == versions[i],
                    "{}: {} changed between forward and backward (version {} became {})", title,
                    params[i].spec().name, versions[i], params[i].version());
    Tensors tensors;
    tensors.reserve(saved.size());
    for (const auto& s : saved) tensors.push_back(s.unpack(shared_from_this()));
    Tensors input_grads = backward(tensors, grads);
    CAPSTAN_CHECK(input_grads.size() <= inputs, "{}: {} gradients for {} inputs", title,
                  input_grads.size(), inputs);
    for (size_t i = 0; i < input_grads.size(); ++i) result[i] = std::move(input_grads[i]);
    return result;
  }
};

Tensors edges_of(const Tensors& inputs, const std::vector<Param>& params) {
  Tensors edges = inputs;
  for (const Param& p : params) edges.push_back(p.anchor());
  return edges;
}

bool any_requires_grad(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

}  // namespace

bool needs_backward(const Tensors& inputs, const std::vector<Param>& params) {
  return at::GradMode::is_enabled() && any_requires_grad(edges_of(inputs, params));
}

void record(const Tensors& outputs, NodeSpec spec) {
  if (!at::GradMode::is_enabled()) return;
  const Tensors edges = edges_of(spec.inputs, spec.params);
  if (!any_requires_grad(edges)) return;

  auto node = std::shared_ptr<ClosureNode>(new ClosureNode, torch::autograd::deleteNode);
  node->title = spec.name;
  node->inputs = spec.inputs.size();
  node->params = std::move(spec.params);
  for (const Param& p : node->params) node->versions.push_back(p.version());
  node->backward = std::move(spec.backward);
  node->set_next_edges(torch::autograd::collect_next_edges(edges));
  for (const Tensor& output : outputs) torch::autograd::set_history(output, node);
  for (const Tensor& t : spec.saved) {
    const bool is_output = std::any_of(outputs.begin(), outputs.end(),
                                       [&](const Tensor& output) { return output.is_same(t); });
    node->saved.emplace_back(t, is_output);
  }
}

Tensor record(const Tensor& output, NodeSpec node) {
  record(Tensors{output}, std::move(node));
  return output;
}

Tensor own_or_copy(Tensor gradient) {
  const bool alone = gradient.use_count() == 1 && gradient.storage().use_count() == 1;
  if (alone && gradient.is_contiguous()) return gradient;
  return gradient.clone(at::MemoryFormat::Contiguous);
}

}  // namespace capstan::ops
