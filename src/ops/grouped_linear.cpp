// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: R rows, D input features, O output features.
#include "capstan/ops/grouped_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/linear.h"

namespace capstan::ops {
namespace {

using Projections = std::vector<Projection>;

// Calls visit(projection, first row, rows) for each group.
template <class Visit>
void for_each_group(const Projections& projections, const std::vector<int64_t>& rows,
                    const Visit& visit) {
  int64_t first = 0;
  for (size_t i = 0; i < projections.size(); ++i) {
    visit(projections[i], first, rows[i]);
    first += rows[i];
  }
}

void check_groups(const Tensor& x_RD, const Projections& projections,
                  const std::vector<int64_t>& rows) {
  CAPSTAN_CHECK(!projections.empty() && projections.size() == rows.size(),
                "grouped_linear: {} weights for {} groups", projections.size(), rows.size());
  int64_t sum = 0;
  for (const int64_t count : rows) sum += count;
  CAPSTAN_CHECK(x_RD.dim() == 2 && sum == x_RD.size(0),
                "grouped_linear: groups of {} rows in all for {}", sum, x_RD.size(0));
}

Tensor forward(const Tensor& x_RD, const Projections& projections,
               const std::vector<int64_t>& rows) {
  Tensor y_RO;
  for_each_group(projections, rows, [&](const Projection& p, int64_t first, int64_t count) {
    CAPSTAN_CHECK(p.bias.empty(), "grouped_linear: {} has a bias", p.parts.front().spec().name);
    const Tensor weight_OD = p.weight();
    if (!y_RO.defined()) y_RO = at::empty({x_RD.size(0), weight_OD.size(0)}, x_RD.options());
    if (count == 0) return;
    multiply_into(y_RO.narrow(0, first, count), x_RD.narrow(0, first, count), weight_OD.t());
  });
  return y_RO;
}

}  // namespace

Tensor grouped_linear(const Tensor& x_RD, std::span<const Projection> list,
                      const std::vector<int64_t>& rows) {
  const Projections projections(list.begin(), list.end());
  check_groups(x_RD, projections, rows);
  Tensor y_RO;
  {
    at::NoGradGuard no_grad;
    y_RO = forward(x_RD.detach(), projections, rows);
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
  node.backward = [projections, rows, wants_input_gradient](const Tensors& saved,
                                                            Tensors& grads) -> Tensors {
    at::NoGradGuard no_grad;
    const Tensor grad_RO = grads[0].contiguous();
    Tensor dx_RD;
    for_each_group(projections, rows, [&](const Projection& p, int64_t first, int64_t count) {
      const Tensor grad = grad_RO.narrow(0, first, count);
      if (p.trainable()) linear_weight_gradient(p, grad, saved[0].narrow(0, first, count), false);
      if (!wants_input_gradient) return;
      const Tensor weight_OD = p.weight();
      if (!dx_RD.defined())
        dx_RD = at::empty({grad_RO.size(0), weight_OD.size(1)}, grad_RO.options());
      if (count == 0) return;
      multiply_into(dx_RD.narrow(0, first, count), grad, weight_OD);
    });
    return {dx_RD};
  };
  return record(y_RO, std::move(node));
}

}  // namespace capstan::ops
