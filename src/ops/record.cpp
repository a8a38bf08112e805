// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/record.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "ops/keep_internal.h"

namespace capstan::ops {
namespace {

using torch::autograd::variable_list;

struct ClosureNode : RemakingNode {
  const char* title = "";
  size_t inputs = 0;
  std::vector<Param> params;
  std::vector<uint64_t> versions;  // of params, at the forward
  std::vector<Saved> saved;
  Backward backward;
  Remake remake;
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  WeakTensor last_remade{Tensor().getIntrusivePtr()};  // while somebody uses it
  bool released = false;

  std::string name() const override { return title; }

  void release_variables() override {
    saved.clear();
    backward = {};
    remake = {};
    released = true;
  }

  Tensors saved_tensors() {
    CAPSTAN_CHECK(!released, "{}: backward ran a second time after its tensors were freed", title);
    Tensors tensors;
    tensors.reserve(saved.size());
    for (const auto& s : saved) tensors.push_back(s.get(shared_from_this()));
    return tensors;
  }

  std::unique_ptr<Kept> remade(size_t output) override;

  Tensor remade_output() {
    if (auto made = last_remade.lock(); made.defined()) return Tensor(std::move(made));
    const at::NoGradGuard no_grad;
    Tensor made = remake.make(saved_tensors());
    last_remade = WeakTensor(made.getIntrusivePtr());
    return made;
  }

  variable_list apply(variable_list&& grads) override {
    variable_list result(num_outputs());
    const auto is_defined = [](const Tensor& t) { return t.defined(); };
    if (std::none_of(grads.begin(), grads.end(), is_defined)) return result;
    for (size_t i = 0; i < params.size(); ++i)
      CAPSTAN_CHECK(params[i].version() == versions[i],
                    "{}: {} changed between forward and backward (version {} became {})", title,
                    params[i].spec().name, versions[i], params[i].version());
    const Tensors tensors = saved_tensors();
    Tensors input_grads = backward(tensors, grads);
    CAPSTAN_CHECK(input_grads.size() <= inputs, "{}: {} gradients for {} inputs", title,
                  input_grads.size(), inputs);
    for (size_t i = 0; i < input_grads.size(); ++i) result[i] = std::move(input_grads[i]);
    return result;
  }
};

// An output that its node makes again. The node lives as long as what comes after it.
struct RemadeOutput final : Kept {
  std::weak_ptr<torch::autograd::Node> node;
  explicit RemadeOutput(std::weak_ptr<torch::autograd::Node> from) : node(std::move(from)) {}
  Tensor get() override {
    const auto from = std::static_pointer_cast<ClosureNode>(node.lock());
    CAPSTAN_CHECK(from, "an output is made again after its op is gone");
    return from->remade_output();
  }
};

std::unique_ptr<Kept> ClosureNode::remade(size_t output) {
  if (repeat && output == 0) return repeat->result();
  if (!remake.make || output != remake.output) return nullptr;
  return std::make_unique<RemadeOutput>(weak_from_this());
}

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
  node->remake = std::move(spec.remake);
  node->set_next_edges(torch::autograd::collect_next_edges(edges));
  for (const Tensor& output : outputs) torch::autograd::set_history(output, node);
  for (const Tensor& t : spec.saved) {
    if (Repeat::running() && Repeat::running()->take_in(t)) continue;
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
