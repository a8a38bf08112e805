// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: D input features, F features between, O output features, N tokens.
#include "capstan/ops/linear_gelu.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "capstan/ops/gemm.h"
#include "ops/linear_internal.h"

namespace capstan::ops {
namespace {

// One product does it all; what is not cuBLASLt's it does in parts by itself.
bool is_one_product(GeluForm form, const Projection& projection, LinearMode mode,
                    std::initializer_list<Tensor> tensors) {
  if (form != GeluForm::kTanh || fp8_of(projection, mode)) return false;
  const at::ScalarType type = tensors.begin()->scalar_type();
  return std::all_of(tensors.begin(), tensors.end(),
                     [type](const Tensor& t) { return t.defined() && t.scalar_type() == type; });
}

}  // namespace

Activated activated(const Tensor& sum, GeluForm form) {
  const at::NoGradGuard no_grad;
  Tensor out = at::empty(sum.sizes(), sum.options().requires_grad(false));
  gelu_into(out, sum.detach(), form);
  return {sum, out, form};
}

Activated linear_gelu_forward(const Tensor& x, const Projection& projection, GeluForm form,
                              LinearMode mode) {
  const at::NoGradGuard no_grad;
  const Tensor weight_FD = projection.weight(), bias_F = projection.bias_value();
  if (bias_F.defined() && is_one_product(form, projection, mode, {x, weight_FD, bias_F})) {
    const FreshRows sum(x, weight_FD.size(0)), out(x, weight_FD.size(0));
    multiply({.out_MN = out.rows_NO,
              .a_MK = rows_of(x),
              .b_KN = weight_FD.t(),
              .bias_N = bias_F,
              .sum_MN = sum.rows_NO});
    return {sum.whole, out.whole, form};
  }
  return activated(linear_forward(x, projection, true, mode), form);
}

Tensor linear_gelu_gradient(const Tensor& grad, const Projection& projection, const Tensor& sum,
                            GeluForm form, LinearMode mode) {
  const at::NoGradGuard no_grad;
  const Tensor weight_OF = projection.weight();
  if (is_one_product(form, projection, mode, {grad, weight_OF, sum})) {
    const FreshRows dsum(grad, weight_OF.size(1));
    multiply({.out_MN = dsum.rows_NO,
              .a_MK = rows_of(grad),
              .b_KN = weight_OF,
              .gelu_at_MN = rows_of(sum).contiguous()});
    return dsum.whole;
  }
  const Tensor dsum = linear_input_gradient(grad, projection, mode);
  gelu_gradient_into(dsum, sum, dsum, form);
  return dsum;
}

Activated linear_gelu(const Tensor& x, const Projection& projection, GeluForm form,
                      LinearMode mode) {
  const Activated made = linear_gelu_forward(x, projection, form, mode);
  return {record_linear(made.sum, x, projection, true, mode), made.out, form};
}

Tensor activation_of(const Activated& x) {
  return record(x.out, {"gelu",
                        {x.sum},
                        {},
                        {x.sum},
                        [form = x.form](const Tensors& saved, Tensors& grads) -> Tensors {
                          const at::NoGradGuard no_grad;
                          const Tensor dsum = at::empty_like(saved[0]);
                          gelu_gradient_into(dsum, saved[0], grads[0], form);
                          return {dsum};
                        }});
}

Tensor linear(const Activated& x, const Projection& projection, bool with_bias, LinearMode mode) {
  const Tensor y = linear_forward(x.out, projection, with_bias, mode);
  const bool wants_sum = x.sum.requires_grad();
  return record(y, {"linear",
                    {x.sum},
                    params_of(projection, with_bias),
                    {projection.trainable() ? x.out : Tensor(), wants_sum ? x.sum : Tensor()},
                    [projection, with_bias, wants_sum, mode, form = x.form](
                        const Tensors& saved, Tensors& grads) -> Tensors {
                      linear_weight_gradient(projection, grads[0], saved[0], with_bias, mode);
                      if (!wants_sum) return {Tensor()};
                      return {linear_gelu_gradient(grads[0], projection, saved[1], form, mode)};
                    }});
}

}  // namespace capstan::ops
