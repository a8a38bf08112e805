// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Row-parallel linear. Legend: B samples, T tokens, O features of this rank.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/ops/linear.h"
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
RowGradients row_gradients(const TensorCut& cut, const Tensor& grad,
                           const nn::Projection& projection, bool wants_input) {
  const auto of_input = [&](const Tensor& of_result) {
    return ops::linear_input_gradient(of_result, projection, cut.linear);
  };
  if (!cut.overlap) {
    const Tensor all = cut.sequence ? gather_sequence(cut.group, grad) : grad;
    return {all, wants_input ? of_input(all) : Tensor()};
  }
  RowGradients all;
  ring_gather(cut.group, grad, [&](int rank, const Tensor& part) {
    put_part(all.grad_BTD, part, rank, cut.group.size());
    if (wants_input) put_part(all.input_BTO, of_input(part), rank, cut.group.size());
  });
  return all;
}

}  // namespace

Tensor row_linear(const TensorCut& cut, const Tensor& y, const nn::Projection& projection) {
  const bool wants_input_gradient = y.requires_grad();
  const Tensor sum = ops::record(
      summed_product(cut, y, projection),
      {"row",
       {y},
       projection.parts,
       {projection.trainable() ? y : Tensor()},
       [cut, projection, wants_input_gradient](const ops::Tensors& saved,
                                               ops::Tensors& grads) -> ops::Tensors {
         at::NoGradGuard no_grad;
         const auto all = row_gradients(cut, grads[0], projection, wants_input_gradient);
         if (projection.trainable())
           ops::linear_weight_gradient(projection, all.grad_BTD, saved[0], false, cut.linear);
         return {all.input_BTO};
       }});
  return ops::add_bias(sum, projection);
}

}  // namespace capstan::parallel
