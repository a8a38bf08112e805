// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/gelu.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <numbers>

#include "capstan/ops/path.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

// What x is multiplied with, and the derivative of that.
struct Share {
  Tensor value, slope;
};

Share share_of(const Tensor& x, GeluForm form) {
  if (form == GeluForm::kErf) {
    const double density = 1 / std::sqrt(2 * std::numbers::pi);
    return {0.5 * (1 + at::erf(x / std::numbers::sqrt2)), density * at::exp(-0.5 * x * x)};
  }
  const double root = std::sqrt(2 / std::numbers::pi), cube = 0.044715;
  const Tensor t = at::tanh(root * (x + cube * x * x * x));
  return {0.5 * (1 + t), 0.5 * (1 - t * t) * root * (1 + 3 * cube * x * x)};
}

at::ScalarType wide_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor forward_reference(const Tensor& x_in, GeluForm form) {
  const Tensor x = x_in.to(wide_dtype(x_in));
  return (x * share_of(x, form).value).to(x_in.scalar_type());
}

Tensor backward_reference(const Tensor& x_in, const Tensor& grad, GeluForm form) {
  const Tensor x = x_in.to(wide_dtype(x_in));
  const Share share = share_of(x, form);
  return (grad.to(x.scalar_type()) * (share.value + x * share.slope)).to(x_in.scalar_type());
}

// ATen's kernels are one pass over memory, vectorised for the processor.
const char* aten_name(GeluForm form) { return form == GeluForm::kTanh ? "tanh" : "none"; }

kernels::ActivationArgs device_args(const Tensor& x, const Tensor& out, GeluForm form) {
  return {.dtype = *on_device::dtype_of(x),
          .activation = form == GeluForm::kTanh ? kernels::Activation::kGeluTanh
                                                : kernels::Activation::kGeluErf,
          .gated = false,
          .rows = x.size(-1) > 0 ? x.numel() / x.size(-1) : 0,
          .features = x.size(-1),
          .x = x.const_data_ptr(),
          .out = out.mutable_data_ptr()};
}

Tensor forward(const Tensor& x, GeluForm form, Path path) {
  if (path == Path::kReference) return forward_reference(x, form);
  if (path == Path::kFused) return at::gelu(x, aten_name(form));
  const Tensor out = at::empty_like(x);
  device_kernels()->activation_forward(device_args(x, out, form), on_device::stream());
  return out;
}

Tensor backward(const Tensor& x, const Tensor& grad_in, GeluForm form, Path path) {
  if (path == Path::kReference) return backward_reference(x, grad_in, form);
  const Tensor grad = grad_in.contiguous();
  if (path == Path::kFused) return at::gelu_backward(grad, x, aten_name(form));
  const Tensor out = at::empty_like(x);
  kernels::ActivationArgs args = device_args(x, out, form);
  args.grad = grad.const_data_ptr();
  device_kernels()->activation_backward(args, on_device::stream());
  return out;
}

}  // namespace

Tensor gelu(const Tensor& x_in, GeluForm form) {
  const Path path = path_of(x_in);
  Tensor x, out;
  {
    at::NoGradGuard no_grad;
    x = x_in.contiguous();
    out = forward(x, form, path);
  }
  return record(
      out, {"gelu", {x_in}, {}, {x}, [form, path](const Tensors& saved, Tensors& grads) -> Tensors {
              at::NoGradGuard no_grad;
              return {backward(saved[0], grads[0], form, path)};
            }});
}

}  // namespace capstan::ops
