// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: F features of gate and of up.
#include "capstan/ops/swiglu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/path.h"
#include "ops/cpu/dtypes.h"
#include "ops/cpu/swiglu_kernels.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

Tensor forward_reference(const Tensor& gate_up) {
  const auto parts = gate_up.chunk(2, -1);
  return at::silu(parts[0]) * parts[1];
}

Tensor backward_reference(const Tensor& gate_up, const Tensor& grad) {
  const auto parts = gate_up.chunk(2, -1);
  const Tensor s = at::sigmoid(parts[0]);
  return at::cat({grad * parts[1] * s * (1 + parts[0] * (1 - s)), grad * parts[0] * s}, -1);
}

using Kernel = void (*)(const cpu::SwigluArgs&, int64_t, int64_t);
void run(Kernel kernel, const cpu::SwigluArgs& args, int64_t rows) {
  at::parallel_for(0, rows, cpu::grain(2 * args.features),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor forward_fused(const Tensor& gate_up, cpu::Element element) {
  std::vector<int64_t> sizes = gate_up.sizes().vec();
  sizes.back() /= 2;
  const Tensor out = at::empty(sizes, gate_up.options());
  run(cpu::swiglu_kernels().forward[static_cast<size_t>(element)],
      {gate_up.const_data_ptr(), nullptr, out.mutable_data_ptr(), sizes.back()},
      gate_up.numel() / gate_up.size(-1));
  return out;
}

Tensor backward_fused(const Tensor& gate_up, const Tensor& grad, cpu::Element element) {
  const Tensor grad_rows = grad.contiguous(), out = at::empty_like(gate_up);
  run(cpu::swiglu_kernels().backward[static_cast<size_t>(element)],
      {gate_up.const_data_ptr(), grad_rows.const_data_ptr(), out.mutable_data_ptr(),
       gate_up.size(-1) / 2},
      gate_up.numel() / gate_up.size(-1));
  return out;
}

kernels::ActivationArgs device_args(const Tensor& gate_up, const Tensor& out) {
  return {.dtype = *on_device::dtype_of(gate_up),
          .activation = kernels::Activation::kSilu,
          .gated = true,
          .rows = gate_up.numel() / gate_up.size(-1),
          .features = gate_up.size(-1) / 2,
          .x = gate_up.const_data_ptr(),
          .out = out.mutable_data_ptr()};
}

Tensor forward_on_device(const Tensor& gate_up) {
  std::vector<int64_t> sizes = gate_up.sizes().vec();
  sizes.back() /= 2;
  const Tensor out = at::empty(sizes, gate_up.options());
  device_kernels()->activation_forward(device_args(gate_up, out), on_device::stream());
  return out;
}

Tensor backward_on_device(const Tensor& gate_up, const Tensor& grad_in) {
  const Tensor grad = grad_in.contiguous(), out = at::empty_like(gate_up);
  kernels::ActivationArgs args = device_args(gate_up, out);
  args.grad = grad.const_data_ptr();
  device_kernels()->activation_backward(args, on_device::stream());
  return out;
}

Tensor forward(const Tensor& gate_up, Path form) {
  if (form == Path::kReference) return forward_reference(gate_up);
  if (form == Path::kDevice) return forward_on_device(gate_up);
  return forward_fused(gate_up, *cpu::element_of(gate_up.scalar_type()));
}

Tensor backward(const Tensor& gate_up, const Tensor& grad, Path form) {
  if (form == Path::kReference) return backward_reference(gate_up, grad);
  if (form == Path::kDevice) return backward_on_device(gate_up, grad);
  return backward_fused(gate_up, grad, *cpu::element_of(gate_up.scalar_type()));
}

}  // namespace

Tensor swiglu(const Tensor& gate_up_in) {
  CAPSTAN_CHECK(gate_up_in.size(-1) % 2 == 0 && gate_up_in.size(-1) > 0,
                "swiglu: {} features cannot be halved", gate_up_in.size(-1));
  Path form = path_of(gate_up_in);
  if (form == Path::kFused && !cpu::element_of(gate_up_in.scalar_type())) form = Path::kReference;
  Tensor gate_up, out;
  {
    at::NoGradGuard no_grad;
    gate_up = gate_up_in.contiguous();
    out = forward(gate_up, form);
  }
  return record(out, {"swiglu",
                      {gate_up_in},
                      {},
                      {gate_up},
                      [form](const Tensors& saved, Tensors& grads) -> Tensors {
                        at::NoGradGuard no_grad;
                        return {backward(saved[0], grads[0], form)};
                      }});
}

}  // namespace capstan::ops
