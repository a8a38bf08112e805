// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/gelu.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <numbers>

#include "capstan/base/check.h"
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

// x, grad and out contiguous.
void forward(Tensor out, const Tensor& x, GeluForm form, Path path) {
  if (path == Path::kReference)
    out.copy_(forward_reference(x, form));
  else if (path == Path::kFused)
    at::gelu_out(out, x, aten_name(form));
  else
    device_kernels()->activation_forward(device_args(x, out, form), on_device::stream());
}

void backward(Tensor out, const Tensor& x, const Tensor& grad, GeluForm form, Path path) {
  if (path == Path::kReference) {
    out.copy_(backward_reference(x, grad, form));
  } else if (path == Path::kFused) {
    at::gelu_backward_out(out, grad, x, aten_name(form));
  } else {
    kernels::ActivationArgs args = device_args(x, out, form);
    args.grad = grad.const_data_ptr();
    device_kernels()->activation_backward(args, on_device::stream());
  }
}

void check_alike(const Tensor& out, const Tensor& x) {
  CAPSTAN_CHECK(
      out.is_contiguous() && out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type(),
      "gelu: {} numbers of {} into {} of {}", x.numel(), c10::toString(x.scalar_type()),
      out.numel(), c10::toString(out.scalar_type()));
}

}  // namespace

void gelu_into(const Tensor& out, const Tensor& x, GeluForm form) {
  const at::NoGradGuard no_grad;
  check_alike(out, x);
  forward(out, x.contiguous(), form, path_of(x));
}

void gelu_gradient_into(const Tensor& out, const Tensor& x, const Tensor& grad, GeluForm form) {
  const at::NoGradGuard no_grad;
  check_alike(out, x);
  check_alike(out, grad);
  backward(out, x.contiguous(), grad.contiguous(), form, path_of(x));
}

Tensor gelu(const Tensor& x_in, GeluForm form) {
  const Path path = path_of(x_in);
  Tensor whole, out;
  {
    at::NoGradGuard no_grad;
    whole = x_in.contiguous();
    out = at::empty_like(whole);
    forward(out, whole, form, path);
  }
  return record(
      out,
      {"gelu", {x_in}, {}, {whole}, [form, path](const Tensors& saved, Tensors& grads) -> Tensors {
         at::NoGradGuard no_grad;
         const Tensor& x = saved[0];
         Tensor dx = at::empty_like(x);
         backward(dx, x, grads[0].contiguous(), form, path);
         return {dx};
       }});
}

}  // namespace capstan::ops
