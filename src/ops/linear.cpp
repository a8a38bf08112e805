// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: D input features, O output features, N tokens.
#include "capstan/ops/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/gemm.h"
#include "ops/gemm_internal.h"
#include "ops/linear_internal.h"

namespace capstan::ops {
namespace {

bool trains_bias(const Projection& projection) {
  return !projection.bias.empty() && projection.bias.front().trainable();
}

bool have_same_type(const Tensor& a, const Tensor& b) { return a.scalar_type() == b.scalar_type(); }

// GPUs and tiles of CPUs multiply 16-bit factors and add fp32 products to the buffer in one GEMM.
bool multiplies_wide(const Product& product) {
  const Tensor& factor = product.a_MK;
  if (factor.is_cpu()) return is_for_tiles(product);
  return product.out_MN.scalar_type() == at::kFloat &&
         adds_wide(factor.device(), factor.scalar_type());
}

}  // namespace

Tensor rows_of(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

FreshRows::FreshRows(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = columns;
  whole = at::empty(sizes, x.options().requires_grad(false));
  rows_NO = whole.view({-1, columns});
}

std::vector<Param> params_of(const Projection& projection, bool with_bias) {
  std::vector<Param> params = projection.parts;
  if (with_bias) params.insert(params.end(), projection.bias.begin(), projection.bias.end());
  return params;
}

Fp8Linear* fp8_of(const Projection& projection, LinearMode mode) {
  return mode.fp8 && Fp8Linear::covers(projection) ? mode.fp8 : nullptr;
}

void multiply_into(Tensor out, const Tensor& a, const Tensor& b) {
  const auto type = a.element_size() < b.element_size() ? b.scalar_type() : a.scalar_type();
  if (out.scalar_type() == type)
    multiply({.out_MN = out, .a_MK = a.to(type), .b_KN = b.to(type)});
  else
    out.copy_(at::mm(a.to(type), b.to(type)));
}

Tensor linear_forward(const Tensor& x, const Tensor& weight_OD, const Tensor& bias_O) {
  CAPSTAN_CHECK(x.size(-1) == weight_OD.size(1), "linear: input has {} features, weight needs {}",
                x.size(-1), weight_OD.size(1));
  at::NoGradGuard no_grad;
  FreshRows y(x, weight_OD.size(0));
  if (bias_O.defined() && have_same_type(x, weight_OD) && have_same_type(x, bias_O)) {
    multiply({.out_MN = y.rows_NO, .a_MK = rows_of(x), .b_KN = weight_OD.t(), .bias_N = bias_O});
    return y.whole;
  }
  multiply_into(y.rows_NO, rows_of(x), weight_OD.t());
  if (bias_O.defined()) y.rows_NO.add_(bias_O);
  return y.whole;
}

Tensor linear_input_gradient(const Tensor& grad, const Tensor& weight_OD) {
  at::NoGradGuard no_grad;
  FreshRows dx(grad, weight_OD.size(1));
  multiply_into(dx.rows_NO, rows_of(grad), weight_OD);
  return dx.whole;
}

void add_outer_product(param::GradSlot& slot, const Tensor& grad_NO, const Tensor& x_in,
                       Tensor* sums_O) {
  if (grad_NO.size(0) == 0 && !slot.overwrite && !sums_O) return;  // adds nothing
  at::NoGradGuard no_grad;
  const Tensor x_ND = x_in.to(grad_NO.scalar_type());
  Product product{
      .out_MN = slot.buffer, .a_MK = grad_NO.t(), .b_KN = x_ND, .accumulates = !slot.overwrite};
  const bool is_wide = multiplies_wide(product);
  if (!have_same_type(slot.buffer, grad_NO) && !is_wide)
    return param::add_to_slot(slot, at::mm(grad_NO.t(), x_ND));
  if (sums_O && is_wide)
    product.row_sums_M = *sums_O = at::empty({grad_NO.size(1)}, slot.buffer.options());
  multiply(product);
  slot.overwrite = false;
}

Tensor linear_forward(const Tensor& x, const Projection& projection, bool with_bias,
                      LinearMode mode) {
  const Tensor weight_OD = projection.weight();
  const Tensor bias_O = with_bias ? projection.bias_value() : Tensor();
  Fp8Linear* const fp8 = fp8_of(projection, mode);
  if (!fp8) return linear_forward(x, weight_OD, bias_O);
  at::NoGradGuard no_grad;
  FreshRows y(x, weight_OD.size(0));
  fp8->forward(y.rows_NO, rows_of(x), projection, bias_O, mode.observes);
  return y.whole;
}

Tensor linear_input_gradient(const Tensor& grad, const Projection& projection, LinearMode mode) {
  const Tensor weight_OD = projection.weight();
  Fp8Linear* const fp8 = fp8_of(projection, mode);
  if (!fp8) return linear_input_gradient(grad, weight_OD);
  at::NoGradGuard no_grad;
  FreshRows dx(grad, weight_OD.size(1));
  fp8->input_gradient(dx.rows_NO, rows_of(grad), projection);
  return dx.whole;
}

void add_outer_product(param::GradSlot& slot, const Tensor& grad_NO, const Tensor& x_ND,
                       const Projection& projection, LinearMode mode, Tensor* sums_O) {
  if (Fp8Linear* const fp8 = fp8_of(projection, mode))
    return fp8->add_weight_gradient(slot, grad_NO, x_ND, projection);
  add_outer_product(slot, grad_NO, x_ND, sums_O);
}

void linear_bias_gradient(const Projection& projection, const Tensor& grad) {
  if (!trains_bias(projection)) return;
  at::NoGradGuard no_grad;
  const auto wide = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor sum_O = at::sum(rows_of(grad), {0}, false, wide);
  projection.accumulate_bias([sum_O](param::GradSlot& slot) { param::add_to_slot(slot, sum_O); });
}

void linear_weight_gradient(const Projection& projection, const Tensor& grad, const Tensor& x,
                            bool with_bias, LinearMode mode) {
  const Tensor grad_NO = rows_of(grad).detach();
  const Tensor x_ND = projection.trainable() ? rows_of(x).detach() : Tensor();
  linear_gradients(projection, grad_NO, with_bias,
                   [grad_NO, x_ND, projection, mode](param::GradSlot& slot, Tensor* sums_O) {
                     add_outer_product(slot, grad_NO, x_ND, projection, mode, sums_O);
                   });
}

void linear_gradients(const Projection& projection, const Tensor& grad_NO, bool with_bias,
                      const AddWeightGradient& add) {
  struct Sums {
    bool are_wanted;
    Tensor value_O;
  };
  const auto sums = std::make_shared<Sums>(Sums{with_bias && trains_bias(projection), {}});
  projection.accumulate([add, sums](param::GradSlot& slot) {
    add(slot, sums->are_wanted ? &sums->value_O : nullptr);
  });
  sums->are_wanted = false;  // later than here they come too late
  const Tensor sums_O = std::move(sums->value_O);
  if (sums_O.defined())
    projection.accumulate_bias(
        [sums_O](param::GradSlot& slot) { param::add_to_slot(slot, sums_O); });
  else if (with_bias)
    linear_bias_gradient(projection, grad_NO);
}

Tensor record_linear(const Tensor& y, const Tensor& x, const Projection& projection, bool with_bias,
                     LinearMode mode) {
  const bool wants_input_grad = x.requires_grad();
  return record(y, {"linear",
                    {x},
                    params_of(projection, with_bias),
                    {projection.trainable() ? x : Tensor()},
                    [projection, with_bias, wants_input_grad, mode](const Tensors& saved,
                                                                    Tensors& grads) -> Tensors {
                      linear_weight_gradient(projection, grads[0], saved[0], with_bias, mode);
                      if (!wants_input_grad) return {Tensor()};
                      return {linear_input_gradient(grads[0], projection, mode)};
                    }});
}

Tensor linear(const Tensor& x, const Projection& projection, bool with_bias, LinearMode mode) {
  const Tensor y = linear_forward(x, projection, with_bias, mode);
  return record_linear(y, x, projection, with_bias, mode);
}

Tensor add_bias(const Tensor& y, const Projection& projection) {
  if (projection.bias.empty()) return y;
  Tensor sum = y.detach();
  {
    at::NoGradGuard no_grad;
    sum.add_(projection.bias_value());
  }
  return record(sum, {"add_bias",
                      {y},
                      projection.bias,
                      {},
                      [projection](const Tensors&, Tensors& grads) -> Tensors {
                        linear_bias_gradient(projection, grads[0]);
                        return {grads[0]};
                      }});
}

}  // namespace capstan::ops
