// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: N tokens, D hidden features.
#include "capstan/ops/norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/path.h"
#include "ops/cpu/dtypes.h"
#include "ops/cpu/norm_kernels.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

// The weight's gradient is summed per group of rows, then over groups: the same bits for any number
// of threads.
constexpr int64_t kRowsPerGroup = 64;

struct NormCall {
  Param weight;
  double eps;
  at::ScalarType residual_dtype, compute_dtype;
  bool has_hidden;
  Path path;
};

at::ScalarType wide_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

struct NormForward {
  Tensor residual, normed, rstd;
};

NormForward forward_reference(const Tensor& residual, const Tensor& hidden, const NormCall& call) {
  const auto wide = wide_dtype(call.residual_dtype);
  const Tensor sum = hidden.defined()
                         ? (residual.to(wide) + hidden.to(wide)).to(call.residual_dtype)
                         : residual.detach();
  const Tensor x = sum.to(wide);
  const Tensor rstd = at::rsqrt(x.square().mean(-1, true) + call.eps);
  const Tensor normed = (x * rstd * call.weight.value().to(wide)).to(call.compute_dtype);
  return {sum, normed, rstd};
}

// Gradients of residual and hidden; adds the weight's.
Tensors backward_reference(const Tensor& x_in, const Tensor& rstd, const Tensor& grad_residual,
                           const Tensor& grad_normed, const NormCall& call) {
  const auto wide = wide_dtype(call.residual_dtype);
  const Tensor x = x_in.to(wide), normed = x * rstd, grad = grad_normed.to(wide);
  if (call.weight.trainable()) {
    const Tensor dw = (grad * normed).reshape({-1, normed.size(-1)}).sum(0);
    call.weight.accumulate([dw](param::GradSlot& slot) { param::add_to_slot(slot, dw); });
  }
  const Tensor g = grad * call.weight.value().to(wide);
  Tensor dx = rstd * (g - normed * (g * normed).mean(-1, true));
  if (grad_residual.defined()) dx = dx + grad_residual.to(wide);
  return {dx.to(call.residual_dtype), call.has_hidden ? dx.to(call.compute_dtype) : Tensor()};
}

size_t weight_kind(const NormCall& call, const Tensor& weight) {
  const bool is_compute = weight.scalar_type() == call.compute_dtype;
  return static_cast<size_t>(is_compute ? cpu::NormWeight::kCompute : cpu::NormWeight::kResidual);
}

NormForward forward_fused(const Tensor& residual_in, const Tensor& hidden_in,
                          const NormCall& call) {
  const Tensor residual = residual_in.contiguous(), weight = call.weight.value();
  const Tensor hidden = hidden_in.defined() ? hidden_in.contiguous() : Tensor();
  const int64_t width = residual.size(-1), rows = residual.numel() / width;
  std::vector<int64_t> rstd_sizes = residual.sizes().vec();
  rstd_sizes.back() = 1;
  NormForward out{hidden.defined() ? at::empty_like(residual) : residual.detach(),
                  at::empty(residual.sizes(), residual.options().dtype(call.compute_dtype)),
                  at::empty(rstd_sizes, residual.options().dtype(wide_dtype(call.residual_dtype)))};
  const cpu::NormForwardArgs args{.residual = residual.const_data_ptr(),
                                  .hidden = hidden.defined() ? hidden.const_data_ptr() : nullptr,
                                  .weight = weight.const_data_ptr(),
                                  .sum = out.residual.mutable_data_ptr(),
                                  .normed = out.normed.mutable_data_ptr(),
                                  .rstd = out.rstd.mutable_data_ptr(),
                                  .width = width,
                                  .eps = call.eps};
  const auto pair = cpu::dtype_pair(call.residual_dtype, call.compute_dtype);
  const auto kernel =
      cpu::norm_kernels().forward[weight_kind(call, weight)][static_cast<size_t>(*pair)];
  at::parallel_for(0, rows, cpu::grain(width),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensors backward_fused(const Tensor& x, const Tensor& rstd, Tensor grad_residual,
                       const Tensor& grad_normed_in, const NormCall& call) {
  const Tensor grad_normed = grad_normed_in.contiguous(), weight = call.weight.value();
  const int64_t width = x.size(-1), rows = x.numel() / width;
  const bool adds = grad_residual.defined();
  const Tensor dx = adds ? own_or_copy(std::move(grad_residual)) : at::empty_like(x);
  const bool two_dtypes = call.has_hidden && call.residual_dtype != call.compute_dtype;
  const Tensor d_hidden = two_dtypes ? at::empty_like(grad_normed) : Tensor();
  const int64_t groups = (rows + kRowsPerGroup - 1) / kRowsPerGroup;
  const Tensor partial =
      call.weight.trainable() ? at::empty({groups, width}, rstd.options()) : Tensor();
  const cpu::NormBackwardArgs args{
      .x = x.const_data_ptr(),
      .rstd = rstd.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .grad = grad_normed.const_data_ptr(),
      .dx = dx.mutable_data_ptr(),
      .add_to_dx = adds,
      .d_hidden = two_dtypes ? d_hidden.mutable_data_ptr() : nullptr,
      .partial = partial.defined() ? partial.mutable_data_ptr() : nullptr,
      .rows = rows,
      .width = width,
      .rows_per_group = kRowsPerGroup};
  const auto pair = cpu::dtype_pair(call.residual_dtype, call.compute_dtype);
  const auto kernel =
      cpu::norm_kernels().backward[weight_kind(call, weight)][static_cast<size_t>(*pair)];
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (partial.defined()) {
    const Tensor dw = partial.sum(0);
    call.weight.accumulate([dw](param::GradSlot& slot) { param::add_to_slot(slot, dw); });
  }
  if (!call.has_hidden) return {dx, Tensor()};
  return {dx, two_dtypes ? d_hidden : dx};
}

kernels::NormTypes device_types(const NormCall& call, const Tensor& weight) {
  return {*on_device::dtype_of(call.residual_dtype), *on_device::dtype_of(call.compute_dtype),
          *on_device::dtype_of(weight)};
}

NormForward forward_on_device(const Tensor& residual_in, const Tensor& hidden_in,
                              const NormCall& call) {
  const Tensor residual = residual_in.contiguous(), weight = call.weight.value();
  const Tensor hidden = hidden_in.defined() ? hidden_in.contiguous() : Tensor();
  const int64_t width = residual.size(-1);
  std::vector<int64_t> rstd_sizes = residual.sizes().vec();
  rstd_sizes.back() = 1;
  NormForward out{hidden.defined() ? at::empty_like(residual) : residual.detach(),
                  at::empty(residual.sizes(), residual.options().dtype(call.compute_dtype)),
                  at::empty(rstd_sizes, residual.options().dtype(wide_dtype(call.residual_dtype)))};
  device_kernels()->rms_norm_forward(
      {.types = device_types(call, weight),
       .shape = {residual.numel() / width, width},
       .eps = call.eps,
       .residual = residual.const_data_ptr(),
       .hidden = hidden.defined() ? hidden.const_data_ptr() : nullptr,
       .weight = weight.const_data_ptr(),
       .sum = hidden.defined() ? out.residual.mutable_data_ptr() : nullptr,
       .normed = out.normed.mutable_data_ptr(),
       .rstd = out.rstd.mutable_data_ptr()},
      on_device::stream());
  return out;
}

Tensors backward_on_device(const Tensor& x, const Tensor& rstd, Tensor grad_residual,
                           const Tensor& grad_normed_in, const NormCall& call) {
  const Tensor grad_normed = grad_normed_in.contiguous(), weight = call.weight.value();
  const int64_t width = x.size(-1), rows = x.numel() / width;
  const bool adds = grad_residual.defined(), trains = call.weight.trainable();
  const Tensor dx = adds ? own_or_copy(std::move(grad_residual)) : at::empty_like(x);
  const bool two_dtypes = call.has_hidden && call.residual_dtype != call.compute_dtype;
  const Tensor d_hidden = two_dtypes ? at::empty_like(grad_normed) : Tensor();
  const Tensor dw = trains ? at::zeros({width}, rstd.options()) : Tensor();
  const Tensor partial =
      trains ? at::empty({2, device_kernels()->norm_partial_rows(rows), width}, rstd.options()) : Tensor();
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  device_kernels()->rms_norm_backward({.types = device_types(call, weight),
                                       .shape = {rows, width},
                                       .x = x.const_data_ptr(),
                                       .rstd = rstd.const_data_ptr(),
                                       .weight = weight.const_data_ptr(),
                                       .grad = grad_normed.const_data_ptr(),
                                       .grad_residual = adds ? dx.const_data_ptr() : nullptr,
                                       .dx = dx.mutable_data_ptr(),
                                       .d_hidden = pointer(d_hidden),
                                       .grad_weight = pointer(dw),
                                       .partial = pointer(partial)},
                                      on_device::stream());
  if (trains) call.weight.accumulate([dw](param::GradSlot& slot) { param::add_to_slot(slot, dw); });
  if (!call.has_hidden) return {dx, Tensor()};
  return {dx, two_dtypes ? d_hidden : dx};
}

Tensors backward(const NormCall& call, const Tensors& saved, Tensors& grads) {
  at::NoGradGuard no_grad;
  if (!grads[1].defined())  // the normed output was not used
    return {grads[0], call.has_hidden ? grads[0].to(call.compute_dtype) : Tensor()};
  if (call.path == Path::kReference)
    return backward_reference(saved[0], saved[1], grads[0], grads[1], call);
  if (call.path == Path::kDevice)
    return backward_on_device(saved[0], saved[1], std::move(grads[0]), grads[1], call);
  return backward_fused(saved[0], saved[1], std::move(grads[0]), grads[1], call);
}

NormForward forward(const Tensor& residual, const Tensor& hidden, const NormCall& call) {
  if (call.path == Path::kReference) return forward_reference(residual, hidden, call);
  return call.path == Path::kDevice ? forward_on_device(residual, hidden, call)
                                    : forward_fused(residual, hidden, call);
}

bool has_kernel(const NormCall& call) {
  const auto weight = call.weight.value().scalar_type();
  return cpu::dtype_pair(call.residual_dtype, call.compute_dtype) &&
         (weight == call.compute_dtype || weight == call.residual_dtype);
}

void check_shapes(const Tensor& residual, const Tensor& hidden, const Param& weight) {
  const Tensor w = weight.value();
  CAPSTAN_CHECK(residual.dim() >= 1 && w.numel() == residual.size(-1),
                "add_rms_norm: weight {} of {} elements for {} features", weight.spec().name,
                w.numel(), residual.size(-1));
  CAPSTAN_CHECK(!hidden.defined() || hidden.sizes() == residual.sizes(),
                "add_rms_norm: hidden and residual differ in shape");
  CAPSTAN_CHECK(!hidden.defined() || hidden.scalar_type() == weight.compute_dtype(),
                "add_rms_norm: hidden is not of the compute dtype of {}", weight.spec().name);
}

}  // namespace

AddRmsNorm add_rms_norm(const Tensor& residual, const Tensor& hidden, const Param& weight,
                        double eps, NormOutput output) {
  check_shapes(residual, hidden, weight);
  NormCall call{
      weight,           eps, residual.scalar_type(), weight.compute_dtype(), hidden.defined(),
      path_of(residual)};
  if (!has_kernel(call)) call.path = Path::kReference;
  NormForward out;
  {
    at::NoGradGuard no_grad;
    out = forward(residual, hidden, call);
  }
  NodeSpec node{"add_rms_norm", {residual, hidden}, {weight}, {out.residual, out.rstd}, {}};
  node.backward = [call](const Tensors& saved, Tensors& grads) {
    return backward(call, saved, grads);
  };
  if (output == NormOutput::kRemade)  // the sum is its own norm's input
    node.remake = {1, [call](const Tensors& saved) { return forward(saved[0], {}, call).normed; }};
  record(Tensors{out.residual, out.normed}, std::move(node));
  return {out.residual, out.normed};
}

}  // namespace capstan::ops
