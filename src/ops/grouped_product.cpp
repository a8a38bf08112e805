// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: R rows, D input features, O output features, G groups.
#include "ops/grouped_product_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <span>

#include "capstan/ops/linear.h"

namespace capstan::ops::grouped_product {
namespace {

// LibTorch's kernels read rows by 16 bytes.
bool is_aligned(int64_t elements, const Tensor& x) {
  constexpr int64_t kRead = 16;
  return elements * static_cast<int64_t>(x.element_size()) % kRead == 0;
}

// A view [G, O, D] of matrices that lie equally far apart, as those of a block do; else undefined.
Tensor as_one(const Tensors& matrices) {
  const Tensor& first = matrices.front();
  const auto place = [](const Tensor& x) { return x.storage_offset(); };
  const int64_t step = matrices.size() > 1 ? place(matrices[1]) - place(first) : first.numel();
  bool is_regular = step >= first.numel() && is_aligned(step, first);
  for (size_t g = 0; g < matrices.size(); ++g)
    is_regular = is_regular && matrices[g].is_contiguous() && matrices[g].is_alias_of(first) &&
                 matrices[g].sizes() == first.sizes() &&
                 place(matrices[g]) == place(first) + static_cast<int64_t>(g) * step;
  if (!is_regular) return {};
  const auto groups = static_cast<int64_t>(matrices.size());
  return first.as_strided({groups, first.size(0), first.size(1)}, {step, first.size(1), 1});
}

// Weights as one tensor [G, O, D], a copy where they are no view.
Tensor stacked(const Projections& projections) {
  Tensors weights;
  for (const Projection& p : projections) weights.push_back(p.weight());
  const Tensor view_GOD = as_one(weights);
  return view_GOD.defined() ? view_GOD : at::stack(weights);
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

using Slots = std::vector<param::GradSlot*>;

// Calls use() with the slots of all at a time, those of the list behind the ones that are there.
void with_slots(std::span<const Projection> list, Slots& slots,
                const std::function<void(const Slots&)>& use) {
  if (list.empty()) return use(slots);
  list.front().accumulate(
      [&](param::GradSlot& slot) {
        slots.push_back(&slot);
        with_slots(list.subspan(1), slots, use);
      },
      param::When::kNow);
}

// One product where the buffers are one view, else one for each.
void add_products(const Slots& slots, const Tensor& grad_GRO, const Tensor& x_GRD) {
  const at::NoGradGuard no_grad;
  Tensors buffers;
  bool are_alike = true;
  for (const param::GradSlot* slot : slots) {
    buffers.push_back(slot->buffer);
    are_alike = are_alike && slot->overwrite == slots.front()->overwrite;
  }
  Tensor all_GOD = are_alike ? as_one(buffers) : Tensor();
  if (!all_GOD.defined()) {
    for (size_t g = 0; g < slots.size(); ++g)
      add_outer_product(*slots[g], grad_GRO[static_cast<int64_t>(g)],
                        x_GRD[static_cast<int64_t>(g)]);
    return;
  }
  at::baddbmm_out(all_GOD, all_GOD, grad_GRO.transpose(1, 2), x_GRD, all_GOD.scalar_type(),
                  slots.front()->overwrite ? 0 : 1, 1);
  for (param::GradSlot* slot : slots) slot->overwrite = false;
}

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

void add_equal_gradients(const Tensor& grad_RO, const Tensor& x_RD,
                         const Projections& projections) {
  constexpr int64_t kMostSlots = 64;  // their calls are nested
  const auto groups = static_cast<int64_t>(projections.size());
  const Tensor grad_GRO = grad_RO.view({groups, -1, grad_RO.size(1)});
  const Tensor x_GRD = x_RD.contiguous().view({groups, -1, x_RD.size(1)});
  for (int64_t first = 0; first < groups; first += kMostSlots) {
    const int64_t count = std::min(kMostSlots, groups - first);
    const Projections some(projections.begin() + first, projections.begin() + first + count);
    some.front().accumulate([some, grad = grad_GRO.narrow(0, first, count),
                             x = x_GRD.narrow(0, first, count)](param::GradSlot& slot) {
      Slots slots{&slot};
      with_slots(std::span(some).subspan(1), slots,
                 [&](const Slots& all) { add_products(all, grad, x); });
    });
  }
}

}  // namespace capstan::ops::grouped_product
