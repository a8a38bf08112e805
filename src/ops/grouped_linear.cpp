// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: R rows, D input features, O output features, G groups.
#include "capstan/ops/grouped_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <numeric>

#include "capstan/base/check.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/linear.h"
#include "ops/grouped_product_internal.h"

namespace capstan::ops {
namespace {

using grouped_product::Projections;

// Calls visit(projection, first row, rows) for each group.
template <class Visit>
void for_each_group(const Projections& projections, const std::vector<int64_t>& counts,
                    const Visit& visit) {
  int64_t first = 0;
  for (size_t i = 0; i < projections.size(); ++i) {
    visit(projections[i], first, counts[i]);
    first += counts[i];
  }
}

void check_groups(const Tensor& x_RD, const Projections& projections, const RowGroups& groups) {
  CAPSTAN_CHECK(!projections.empty() && x_RD.dim() == 2, "grouped_linear: {} weights, rows of {}",
                projections.size(), x_RD.dim());
  const bool has_counts = !groups.ends.defined() || !groups.counts.empty();
  if (has_counts) {
    int64_t sum = 0;
    for (const int64_t count : groups.counts) sum += count;
    CAPSTAN_CHECK(projections.size() == groups.counts.size() && sum == x_RD.size(0),
                  "grouped_linear: {} weights, {} groups of {} rows in all for {}",
                  projections.size(), groups.counts.size(), sum, x_RD.size(0));
  }
  if (groups.ends.defined())
    CAPSTAN_CHECK(
        groups.ends.scalar_type() == at::kInt &&
            groups.ends.sizes() == at::IntArrayRef(static_cast<int64_t>(projections.size())),
        "grouped_linear: {} ends of {} for {} weights", groups.ends.numel(),
        c10::toString(groups.ends.scalar_type()), projections.size());
  for (const Projection& p : projections)
    CAPSTAN_CHECK(p.bias.empty(), "grouped_linear: {} has a bias", p.parts.front().spec().name);
}

Tensor forward(const Tensor& x_RD, const Projections& projections, const RowGroups& groups) {
  if (groups.ends.defined()) return grouped_product::forward(x_RD, projections, groups.ends);
  Tensor y_RO;
  for_each_group(
      projections, groups.counts, [&](const Projection& p, int64_t first, int64_t count) {
        const Tensor weight_OD = p.weight();
        if (!y_RO.defined()) y_RO = at::empty({x_RD.size(0), weight_OD.size(0)}, x_RD.options());
        if (count == 0) return;
        multiply_into(y_RO.narrow(0, first, count), x_RD.narrow(0, first, count), weight_OD.t());
      });
  return y_RO;
}

void add_in_turn(const Tensor& grad_RO, const Tensor& x_RD, const Projections& projections,
                 const std::vector<int64_t>& counts) {
  for_each_group(projections, counts, [&](const Projection& p, int64_t first, int64_t count) {
    if (p.trainable())
      linear_weight_gradient(p, grad_RO.narrow(0, first, count), x_RD.narrow(0, first, count),
                             false);
  });
}

bool takes_one_sum(const Projections& projections, const std::vector<int64_t>& counts) {
  const auto is_like_first = [&](int64_t count) { return count == counts.front(); };
  return counts.front() > 0 && std::all_of(counts.begin(), counts.end(), is_like_first) &&
         std::all_of(projections.begin(), projections.end(),
                     [](const Projection& p) { return p.trainable(); });
}

void add_weight_gradients(const Tensor& grad_RO, const Tensor& x_RD, const Projections& projections,
                          const RowGroups& groups) {
  if (groups.counts.empty())
    grouped_product::add_weight_gradients(grad_RO, x_RD, projections, groups.ends);
  else if (takes_one_sum(projections, groups.counts))
    grouped_product::add_equal_gradients(grad_RO, x_RD, projections);
  else
    add_in_turn(grad_RO, x_RD, projections, groups.counts);
}

// x undefined: no weight is trainable.
Tensor backward_in_one(const Tensor& grad_RO, const Tensor& x_RD, const Projections& projections,
                       const RowGroups& groups, bool wants_input_gradient) {
  if (x_RD.defined()) add_weight_gradients(grad_RO, x_RD, projections, groups);
  if (!wants_input_gradient) return {};
  return grouped_product::input_gradient(grad_RO, projections, groups.ends);
}

Tensor backward_in_turn(const Tensor& grad_RO, const Tensor& x_RD, const Projections& projections,
                        const std::vector<int64_t>& counts, bool wants_input_gradient) {
  Tensor dx_RD;
  for_each_group(projections, counts, [&](const Projection& p, int64_t first, int64_t count) {
    const Tensor grad = grad_RO.narrow(0, first, count);
    if (p.trainable()) linear_weight_gradient(p, grad, x_RD.narrow(0, first, count), false);
    if (!wants_input_gradient) return;
    const Tensor weight_OD = p.weight();
    if (!dx_RD.defined())
      dx_RD = at::empty({grad_RO.size(0), weight_OD.size(1)}, grad_RO.options());
    if (count == 0) return;
    multiply_into(dx_RD.narrow(0, first, count), grad, weight_OD);
  });
  return dx_RD;
}

}  // namespace

RowGroups with_ends(std::vector<int64_t> counts, c10::Device device) {
  const auto size = static_cast<int64_t>(counts.size());
  device::Accelerator* const accelerator = device::accelerator();
  const Tensor ends =
      accelerator ? accelerator->empty_pinned({size}, at::kInt) : at::empty({size}, at::kInt);
  std::inclusive_scan(counts.begin(), counts.end(), ends.mutable_data_ptr<int32_t>());
  return {std::move(counts), ends.to(device, at::kInt, /*non_blocking=*/true)};
}

RowGroups equal_groups(int64_t groups, int64_t rows, c10::Device device) {
  const auto ints = at::TensorOptions().dtype(at::kInt).device(device);
  return {std::vector<int64_t>(static_cast<size_t>(groups), rows),
          at::arange(1, groups + 1, ints) * rows};
}

Tensor grouped_linear(const Tensor& x_RD, std::span<const Projection> list,
                      const RowGroups& groups) {
  const Projections projections(list.begin(), list.end());
  check_groups(x_RD, projections, groups);
  Tensor y_RO;
  {
    at::NoGradGuard no_grad;
    y_RO = forward(x_RD.detach(), projections, groups);
  }
  NodeSpec node{
      .name = "grouped_linear", .inputs = {x_RD}, .params = {}, .saved = {}, .backward = {}};
  bool any_trainable = false;
  for (const Projection& p : projections) {
    node.params.insert(node.params.end(), p.parts.begin(), p.parts.end());
    any_trainable |= p.trainable();
  }
  node.saved = {any_trainable ? x_RD : Tensor()};
  const bool wants_input_gradient = x_RD.requires_grad();
  node.backward = [projections, groups, wants_input_gradient](const Tensors& saved,
                                                              Tensors& grads) -> Tensors {
    at::NoGradGuard no_grad;
    const Tensor grad_RO = grads[0].contiguous();
    if (groups.ends.defined())
      return {backward_in_one(grad_RO, saved[0], projections, groups, wants_input_gradient)};
    return {backward_in_turn(grad_RO, saved[0], projections, groups.counts, wants_input_gradient)};
  };
  return record(y_RO, std::move(node));
}

}  // namespace capstan::ops
