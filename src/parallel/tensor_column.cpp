// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Column-parallel linear. Legend: B samples, T tokens, N = B T, D input features, O output
// features.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/ops/linear_gelu.h"
#include "parallel/ring_exchange_internal.h"
#include "parallel/sequence_cut_internal.h"
#include "parallel/tensor_linear_internal.h"

namespace capstan::parallel {
namespace {

using nn::Projection;
using ops::Tensors;

Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// An input of which this rank keeps a part: gathered when the first weight gradient asks, kept for
// the others.
class ColumnInput {
 public:
  ColumnInput(TensorCut cut, const Tensor& x) : cut_(std::move(cut)), x_(x.detach()) {}

  // slot (+)= grad^T x over all tokens, and where one product does it the sums of grad.
  void add_product(param::GradSlot& slot, const Tensor& grad_BTO, const Projection& projection,
                   Tensor* sums_O) {
    if (cut_.overlap) return add_product_by_parts(slot, grad_BTO, projection);
    if (!whole_ND_.defined())
      whole_ND_ = rows_of(cut_.sequence ? gather_sequence(cut_.group, x_) : x_);
    ops::add_outer_product(slot, rows_of(grad_BTO), whole_ND_, projection, cut_.linear, sums_O);
  }

 private:
  void add_product_by_parts(param::GradSlot& slot, const Tensor& grad_BTO,
                            const Projection& projection) {
    const Tensor grads = parts_of_tokens(grad_BTO, cut_.group.size());
    const auto add = [&](int rank, const Tensor& part) {
      ops::add_outer_product(slot, rows_of(grads[rank]), rows_of(part), projection, cut_.linear);
    };
    if (!parts_.empty()) {
      for (const auto& [rank, part] : parts_) add(rank, part);
      return;
    }
    ring_gather(cut_.group, x_, [&](int rank, const Tensor& part) {
      parts_.emplace_back(rank, part);
      add(rank, part);
    });
  }

  TensorCut cut_;
  Tensor x_, whole_ND_;
  std::vector<std::pair<int, Tensor>> parts_;  // in the order of arrival
};

// Sum over the projections of grad W: of all tokens, by the output features of this rank.
Tensor partial_input_gradient(const TensorCut& cut, const std::vector<Projection>& projections,
                              const Tensors& grads) {
  Tensor dx;
  for (size_t i = 0; i < projections.size(); ++i) {
    if (!grads[i].defined()) continue;
    const Tensor weight_OD = projections[i].weight();
    if (!dx.defined())
      dx = ops::linear_input_gradient(grads[i], projections[i], cut.linear);
    else if (!cut.linear.fp8 && weight_OD.scalar_type() == dx.scalar_type())
      dx.view({-1, dx.size(-1)}).addmm_(rows_of(grads[i]), weight_OD);
    else
      dx.add_(ops::linear_input_gradient(grads[i], projections[i], cut.linear));
  }
  return dx;
}

void weight_gradients(const std::vector<Projection>& projections, const Tensors& grads,
                      const std::shared_ptr<ColumnInput>& input) {
  for (size_t i = 0; i < projections.size(); ++i) {
    if (!grads[i].defined()) continue;
    const Tensor grad = grads[i].detach();
    const auto add = [input, grad, projection = projections[i]](param::GradSlot& slot,
                                                                Tensor* sums_O) {
      input->add_product(slot, grad, projection, sums_O);
    };
    ops::linear_gradients(projections[i], rows_of(grad), true, add);
  }
}

// This rank's tokens of the whole input gradient; the sum over the ranks goes round while the next
// part is multiplied.
Tensor input_gradient_by_parts(const TensorCut& cut, const std::vector<Projection>& projections,
                               const Tensors& grads) {
  Tensors parts;
  for (const Tensor& grad : grads)
    parts.push_back(grad.defined() ? parts_of_tokens(grad, cut.group.size()) : Tensor());
  return ring_reduce(cut.group, [&](int rank) {
    Tensors of_rank;
    for (const Tensor& part : parts) of_rank.push_back(part.defined() ? part[rank] : Tensor());
    return partial_input_gradient(cut, projections, of_rank);
  });
}

struct ColumnBackward {
  TensorCut cut;
  std::vector<Projection> projections;
  bool wants_input_gradient;

  Tensors operator()(const Tensors& saved, Tensors& grads) const {
    at::NoGradGuard no_grad;
    const auto input = saved[0].defined() ? std::make_shared<ColumnInput>(cut, saved[0]) : nullptr;
    if (!wants_input_gradient) {
      weight_gradients(projections, grads, input);
      return {Tensor()};
    }
    if (cut.overlap) {
      const Tensor dx = input_gradient_by_parts(cut, projections, grads);
      weight_gradients(projections, grads, input);
      return {dx};
    }
    // The sum over the ranks travels while the weight gradients are multiplied.
    const Tensor dx = partial_input_gradient(cut, projections, grads);
    if (cut.sequence) {
      SequenceReduce reduce(cut.group, dx);
      weight_gradients(projections, grads, input);
      return {reduce.finish()};
    }
    comm::Work sum = cut.group.all_reduce(dx);
    weight_gradients(projections, grads, input);
    sum.wait();
    return {dx};
  }
};

Tensors outputs_by_parts(const TensorCut& cut, const Tensor& x,
                         std::span<const Projection> projections) {
  Tensors parts_pBtO(projections.size());
  ring_gather(cut.group, x, [&](int rank, const Tensor& part) {
    for (size_t i = 0; i < projections.size(); ++i) {
      const Tensor y = ops::linear_forward(part, projections[i], true, cut.linear);
      if (!parts_pBtO[i].defined()) {
        std::vector<int64_t> sizes = y.sizes().vec();
        sizes.insert(sizes.begin(), cut.group.size());
        parts_pBtO[i] = at::empty(sizes, y.options());
      }
      parts_pBtO[i][rank].copy_(y);
    }
  });
  // Detached: the next op may write into the result, which views do not allow.
  for (Tensor& parts : parts_pBtO) parts = tokens_of_parts(parts).detach();
  return parts_pBtO;
}

void record_column(const TensorCut& cut, const Tensors& outputs, const Tensor& x,
                   std::span<const Projection> projections) {
  ops::NodeSpec node{.name = "column", .inputs = {x}, .params = {}, .saved = {}, .backward = {}};
  bool any_trainable = false;
  for (const Projection& p : projections) {
    node.params.insert(node.params.end(), p.parts.begin(), p.parts.end());
    node.params.insert(node.params.end(), p.bias.begin(), p.bias.end());
    any_trainable |= p.trainable();
  }
  node.saved = {any_trainable ? x : Tensor()};
  node.backward = ColumnBackward{cut, {projections.begin(), projections.end()}, x.requires_grad()};
  ops::record(outputs, std::move(node));
}

}  // namespace

std::vector<Tensor> column_linear(const TensorCut& cut, const Tensor& x,
                                  std::span<const Projection> projections) {
  Tensors outputs;
  {
    at::NoGradGuard no_grad;
    if (cut.overlap) {
      outputs = outputs_by_parts(cut, x, projections);
    } else {
      const Tensor all = cut.sequence ? gather_sequence(cut.group, x) : x;
      for (const Projection& p : projections)
        outputs.push_back(ops::linear_forward(all, p, true, cut.linear));
    }
  }
  record_column(cut, outputs, x, projections);
  return outputs;
}

ops::Activated column_gelu_linear(const TensorCut& cut, const Tensor& x,
                                  const Projection& projection, ops::GeluForm form) {
  ops::Activated y;
  {
    at::NoGradGuard no_grad;
    if (cut.overlap) {
      y = ops::activated(outputs_by_parts(cut, x, {&projection, 1}).front(), form);
    } else {
      const Tensor all = cut.sequence ? gather_sequence(cut.group, x) : x;
      y = ops::linear_gelu_forward(all, projection, form, cut.linear);
    }
  }
  record_column(cut, {y.sum}, x, {&projection, 1});
  return y;
}

}  // namespace capstan::parallel
