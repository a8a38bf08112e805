// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Row-parallel linear. Legend: B samples, T tokens, O features of this rank.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/ops/linear_gelu.h"
#include "parallel/ring_exchange_internal.h"
#include "parallel/sequence_cut_internal.h"
#include "parallel/tensor_linear_internal.h"

namespace capstan::parallel {
namespace {

Tensor summed_product(const TensorCut& cut, const Tensor& y, const nn::Projection& projection) {
  at::NoGradGuard no_grad;
  if (cut.overlap) {
    const Tensor parts = parts_of_tokens(y, cut.group.size());
    return ring_reduce(cut.group, [&](int rank) {
      return ops::linear_forward(parts[rank], projection, false, cut.linear);
    });
  }
  const Tensor part = ops::linear_forward(y, projection, false, cut.linear);
  if (cut.sequence) return reduce_sequence(cut.group, part);
  cut.group.all_reduce(part).wait();
  return part;
}

// The tokens of one rank into those of all, which are made by the first part.
void put_part(Tensor& all, const Tensor& part, int rank, int ranks) {
  const int64_t tokens = part.size(1);
  std::vector<int64_t> sizes = part.sizes().vec();
  sizes[1] = tokens * ranks;
  if (!all.defined()) all = at::empty(sizes, part.options());
  all.narrow(1, tokens * rank, tokens).copy_(part);
}

struct RowGradients {
  Tensor grad_BTD;   // of the result, all tokens
  Tensor input_BTO;  // undefined unless wanted
};
// `before`: what the input is GELU of and whose gradient is wanted, where it has a sum.
RowGradients row_gradients(const TensorCut& cut, const Tensor& grad,
                           const nn::Projection& projection, bool wants_input,
                           const ops::Activated& before) {
  const auto of_input = [&](const Tensor& of_result) {
    return ops::linear_input_gradient(of_result, projection, cut.linear);
  };
  const bool wants_sum = wants_input && before.sum.defined();
  if (!cut.overlap) {
    const Tensor all = cut.sequence ? gather_sequence(cut.group, grad) : grad;
    if (wants_sum)
      return {all, ops::linear_gelu_gradient(all, projection, before.sum, before.form, cut.linear)};
    return {all, wants_input ? of_input(all) : Tensor()};
  }
  RowGradients all;
  ring_gather(cut.group, grad, [&](int rank, const Tensor& part) {
    put_part(all.grad_BTD, part, rank, cut.group.size());
    if (wants_input) put_part(all.input_BTO, of_input(part), rank, cut.group.size());
  });
  if (wants_sum) ops::gelu_gradient_into(all.input_BTO, before.sum, all.input_BTO, before.form);
  return all;
}

// Of an input with a history of its own, or of the activation of a sum that has one.
Tensor row_of(const TensorCut& cut, const ops::Activated& y, const nn::Projection& projection) {
  const Tensor& source = y.sum.defined() ? y.sum : y.out;
  const bool wants_input_gradient = source.requires_grad();
  const Tensor sum = ops::record(
      summed_product(cut, y.out, projection),
      {"row",
       {source},
       projection.parts,
       {projection.trainable() ? y.out : Tensor(), wants_input_gradient ? y.sum : Tensor()},
       [cut, projection, wants_input_gradient, form = y.form](const ops::Tensors& saved,
                                                              ops::Tensors& grads) -> ops::Tensors {
         at::NoGradGuard no_grad;
         const auto all = row_gradients(cut, grads[0], projection, wants_input_gradient,
                                        {saved[1], saved[0], form});
         if (projection.trainable())
           ops::linear_weight_gradient(projection, all.grad_BTD, saved[0], false, cut.linear);
         return {all.input_BTO};
       }});
  return ops::add_bias(sum, projection);
}

}  // namespace

Tensor row_linear(const TensorCut& cut, const Tensor& y, const nn::Projection& projection) {
  return row_of(cut, {.sum = {}, .out = y}, projection);
}

Tensor row_linear(const TensorCut& cut, const ops::Activated& y, const nn::Projection& projection) {
  return row_of(cut, y, projection);
}

}  // namespace capstan::parallel
