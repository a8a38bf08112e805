// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: R rows, D input features, O output features, G groups.
#include "ops/grouped_product_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>

namespace capstan::ops::grouped_product {
namespace {

// LibTorch's kernels read rows by 16 bytes.
bool is_aligned(int64_t elements, const Tensor& x) {
  constexpr int64_t kRead = 16;
  return elements * static_cast<int64_t>(x.element_size()) % kRead == 0;
}

// Weights as one tensor [G, O, D]: a view where they lie equally far apart, as those of a block do,
// else a copy.
Tensor stacked(const Projections& projections) {
  Tensors weights;
  for (const Projection& p : projections) weights.push_back(p.weight());
  const Tensor& first = weights.front();
  const auto place = [](const Tensor& x) { return x.storage_offset(); };
  const int64_t step = weights.size() > 1 ? place(weights[1]) - place(first) : first.numel();
  bool is_regular = step >= first.numel() && is_aligned(step, first);
  for (size_t g = 0; g < weights.size(); ++g)
    is_regular = is_regular && weights[g].is_contiguous() && weights[g].is_alias_of(first) &&
                 weights[g].sizes() == first.sizes() &&
                 place(weights[g]) == place(first) + static_cast<int64_t>(g) * step;
  if (!is_regular) return at::stack(weights);
  const auto groups = static_cast<int64_t>(weights.size());
  return first.as_strided({groups, first.size(0), first.size(1)}, {step, first.size(1), 1});
}

// Gradients of all weights, multiplied when the first of them is asked for.
class WeightGradients {
 public:
  WeightGradients(Tensor grad_RO, Tensor x_RD, Tensor ends)
      : grad_RO_(std::move(grad_RO)), x_RD_(std::move(x_RD)), ends_(std::move(ends)) {}
  [[nodiscard]] Tensor of(int64_t group) {
    if (!all_GOD_.defined()) multiply();
    return all_GOD_[group];
  }

 private:
  void multiply() {
    const at::NoGradGuard no_grad;
    all_GOD_ = x_RD_.size(0) == 0
                   ? at::zeros({ends_.numel(), grad_RO_.size(1), x_RD_.size(1)}, x_RD_.options())
                   : at::_grouped_mm(grad_RO_.t(), x_RD_, ends_);
    grad_RO_ = x_RD_ = Tensor();
  }
  Tensor grad_RO_, x_RD_, ends_, all_GOD_;
};

}  // namespace

Tensor forward(const Tensor& x_in, const Projections& projections, const Tensor& ends) {
  const Tensor x_RD = x_in.contiguous(), weights_GOD = stacked(projections);
  if (x_RD.size(0) == 0) return at::empty({0, weights_GOD.size(1)}, x_RD.options());
  return at::_grouped_mm(x_RD, weights_GOD.transpose(1, 2), ends);
}

Tensor input_gradient(const Tensor& grad_RO, const Projections& projections, const Tensor& ends) {
  const Tensor weights_GOD = stacked(projections);
  if (grad_RO.size(0) == 0) return at::empty({0, weights_GOD.size(2)}, grad_RO.options());
  return at::_grouped_mm(grad_RO, weights_GOD, ends);
}

void add_weight_gradients(const Tensor& grad_RO, const Tensor& x_RD, const Projections& projections,
                          const Tensor& ends) {
  const auto made = std::make_shared<WeightGradients>(grad_RO, x_RD.contiguous(), ends);
  for (size_t g = 0; g < projections.size(); ++g)
    projections[g].accumulate([made, g](param::GradSlot& slot) {
      param::add_to_slot(slot, made->of(static_cast<int64_t>(g)));
    });
}

}  // namespace capstan::ops::grouped_product
