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

}  // namespace

Tensor swiglu(const Tensor& gate_up_in) {
  CAPSTAN_CHECK(gate_up_in.size(-1) % 2 == 0 && gate_up_in.size(-1) > 0,
                "swiglu: {} features cannot be halved", gate_up_in.size(-1));
  const auto element = cpu::element_of(gate_up_in.scalar_type());
  const bool fused = path_of(gate_up_in) == Path::kFused && element.has_value();
  Tensor gate_up, out;
  {
    at::NoGradGuard no_grad;
    gate_up = gate_up_in.contiguous();
    out = fused ? forward_fused(gate_up, *element) : forward_reference(gate_up);
  }
  return record(out, {"swiglu",
                      {gate_up_in},
                      {},
                      {gate_up},
                      [fused, element](const Tensors& saved, Tensors& grads) -> Tensors {
                        at::NoGradGuard no_grad;
                        return {fused ? backward_fused(saved[0], grads[0], *element)
                                      : backward_reference(saved[0], grads[0])};
                      }});
}

}  // namespace capstan::ops
