// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, X features of all heads, N heads of q and k, H head size.
#include "capstan/ops/qk_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/path.h"
#include "ops/cpu/dtypes.h"
#include "ops/cpu/qk_norm_kernels.h"
#include "ops/on_device_internal.h"
#include "ops/rope_internal.h"

namespace capstan::ops {
namespace {

struct Call {
  QkNorm norm;
  int64_t query_heads;
  RopeSpec spec;
  RopeInput rope;
  Path path;

  [[nodiscard]] at::ScalarType wide() const { return rope.table.cos.scalar_type(); }
  [[nodiscard]] int64_t key_heads() const { return spec.heads - query_heads; }
  [[nodiscard]] int64_t width() const { return spec.heads * spec.head_size; }
};

Tensor heads_of(const Tensor& x_BTX, const Call& call) {
  return x_BTX.narrow(2, 0, call.width())
      .view({x_BTX.size(0), x_BTX.size(1), call.spec.heads, call.spec.head_size});
}

Tensor weights_NH(const Call& call) {
  const int64_t size = call.spec.head_size;
  return at::cat({call.norm.q_weight_H.value().expand({call.query_heads, size}),
                  call.norm.k_weight_H.value().expand({call.key_heads(), size})})
      .to(call.wide());
}

void add_weight_gradients(const Call& call, const Tensor& dq_H, const Tensor& dk_H) {
  for (const auto& [weight, dw] :
       {std::pair(call.norm.q_weight_H, dq_H), std::pair(call.norm.k_weight_H, dk_H)})
    weight.accumulate([dw = dw](param::GradSlot& slot) { param::add_to_slot(slot, dw); });
}

// Writes the heads of `out` (which may be x) and returns 1 / root mean square, [B, T, N, 1].
Tensor forward_reference(const Tensor& x, const Tensor& out, const Call& call) {
  const Tensor heads = heads_of(x, call).to(call.wide());
  Tensor rstd = at::rsqrt(heads.square().mean(-1, true) + call.norm.eps);
  heads_of(out, call).copy_(turned_heads(heads * rstd * weights_NH(call), call.rope, false));
  return rstd;
}

void backward_reference(const Tensor& x, const Tensor& rstd, const Tensor& grad, const Call& call) {
  const Tensor g = turned_heads(heads_of(grad, call).to(call.wide()), call.rope, true);
  const Tensor normed = heads_of(x, call).to(call.wide()) * rstd;
  const Tensor dw_NH = (g * normed).flatten(0, 1).sum(0);
  const Tensor d = g * weights_NH(call);
  heads_of(grad, call).copy_(rstd * (d - normed * (d * normed).mean(-1, true)));
  add_weight_gradients(call, dw_NH.narrow(0, 0, call.query_heads).sum(0),
                       dw_NH.narrow(0, call.query_heads, call.key_heads()).sum(0));
}

// Sums of gradients per group of rows, then over groups: the same bits for any number of threads.
constexpr int64_t kRowsPerGroup = 64;

cpu::QkNormArgs cpu_args(const Tensor& x, const Tensor& out, const Tensor& rstd, const Call& call) {
  const Tensor& positions = call.rope.positions_BT;
  return {.x = x.const_data_ptr(),
          .out = out.mutable_data_ptr(),
          .row_stride = x.size(2),
          .q_heads = call.query_heads,
          .k_heads = call.key_heads(),
          .head_size = call.spec.head_size,
          .q_weight = call.norm.q_weight_H.value().const_data_ptr(),
          .k_weight = call.norm.k_weight_H.value().const_data_ptr(),
          .rstd = rstd.mutable_data_ptr(),
          .cos = call.rope.table.cos.const_data_ptr(),
          .sin = call.rope.table.sin.const_data_ptr(),
          .positions = positions.defined() ? positions.const_data_ptr<int64_t>() : nullptr,
          .rows_per_sample = x.size(1),
          .eps = call.norm.eps,
          .partial = nullptr,
          .rows = x.size(0) * x.size(1),
          .rows_per_group = kRowsPerGroup};
}

size_t weight_kind(const Call& call, const Tensor& x) {
  return call.norm.q_weight_H.value().scalar_type() == x.scalar_type() ? 0 : 1;
}

Tensor empty_rstd(const Tensor& x, const Call& call) {
  return at::empty({x.size(0), x.size(1), call.spec.heads, 1}, x.options().dtype(call.wide()));
}

Tensor forward_fused(const Tensor& x, const Tensor& out, const Call& call) {
  Tensor rstd = empty_rstd(x, call);
  const cpu::QkNormArgs args = cpu_args(x, out, rstd, call);
  const auto element = static_cast<size_t>(*cpu::element_of(x.scalar_type()));
  const auto kernel = cpu::qk_norm_kernels().forward[weight_kind(call, x)][element];
  at::parallel_for(0, args.rows, cpu::grain(call.width()),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return rstd;
}

void backward_fused(const Tensor& x, const Tensor& rstd, const Tensor& grad, const Call& call) {
  cpu::QkNormArgs args = cpu_args(x, grad, rstd, call);
  const int64_t groups = (args.rows + kRowsPerGroup - 1) / kRowsPerGroup;
  const bool trains = call.norm.q_weight_H.trainable() || call.norm.k_weight_H.trainable();
  const Tensor partial =
      trains ? at::empty({groups, 2, call.spec.head_size}, rstd.options()) : Tensor();
  if (trains) args.partial = partial.mutable_data_ptr();
  const auto element = static_cast<size_t>(*cpu::element_of(x.scalar_type()));
  const auto kernel = cpu::qk_norm_kernels().backward[weight_kind(call, x)][element];
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (!trains) return;
  const Tensor dw = partial.sum(0);
  add_weight_gradients(call, dw[0], dw[1]);
}

kernels::QkNormShape shape_of(const Tensor& x, const Call& call) {
  const Tensor q_weight = call.norm.q_weight_H.value(), k_weight = call.norm.k_weight_H.value();
  const Tensor& positions = call.rope.positions_BT;
  return {.dtype = *on_device::dtype_of(x),
          .weight_dtype = *on_device::dtype_of(q_weight),
          .rows = x.size(0) * x.size(1),
          .q_heads = call.query_heads,
          .k_heads = call.key_heads(),
          .head_size = call.spec.head_size,
          .x_stride = x.size(2),
          .out_stride = x.size(2),
          .q_weight = q_weight.const_data_ptr(),
          .k_weight = k_weight.const_data_ptr(),
          .cos = call.rope.table.cos.const_data_ptr(),
          .sin = call.rope.table.sin.const_data_ptr(),
          .positions = positions.defined() ? positions.const_data_ptr<int64_t>() : nullptr,
          .rows_per_sample = x.size(1)};
}

Tensor forward_on_device(const Tensor& x, const Tensor& out, const Call& call) {
  Tensor rstd = empty_rstd(x, call);
  device_kernels()->qk_norm_rope_forward({.shape = shape_of(x, call),
                                          .eps = call.norm.eps,
                                          .x = x.const_data_ptr(),
                                          .out = out.mutable_data_ptr(),
                                          .rstd = rstd.mutable_data_ptr()},
                                         on_device::stream());
  return rstd;
}

void backward_on_device(const Tensor& x, const Tensor& rstd, const Tensor& grad, const Call& call) {
  const bool trains = call.norm.q_weight_H.trainable() || call.norm.k_weight_H.trainable();
  const int64_t size = call.spec.head_size, rows = x.size(0) * x.size(1);
  const int64_t groups = device_kernels()->norm_partial_rows(rows);
  const Tensor dw = trains ? at::zeros({2, size}, rstd.options()) : Tensor();
  const Tensor partial = trains ? at::empty({2, groups, size}, rstd.options()) : Tensor();
  device_kernels()->qk_norm_rope_backward(
      {.shape = shape_of(x, call),
       .x = x.const_data_ptr(),
       .rstd = rstd.const_data_ptr(),
       .grad = grad.const_data_ptr(),
       .dx = grad.mutable_data_ptr(),
       .grad_q_weight = trains ? dw[0].mutable_data_ptr() : nullptr,
       .grad_k_weight = trains ? dw[1].mutable_data_ptr() : nullptr,
       .partial = trains ? partial.mutable_data_ptr() : nullptr},
      on_device::stream());
  if (trains) add_weight_gradients(call, dw[0], dw[1]);
}

Tensor forward(const Tensor& x, const Tensor& out, const Call& call) {
  if (call.path == Path::kReference) return forward_reference(x, out, call);
  return call.path == Path::kDevice ? forward_on_device(x, out, call) : forward_fused(x, out, call);
}

// The heads of `grad` become those of the gradient of x.
void backward(const Tensor& x, const Tensor& rstd, const Tensor& grad, const Call& call) {
  if (call.path == Path::kReference) return backward_reference(x, rstd, grad, call);
  return call.path == Path::kDevice ? backward_on_device(x, rstd, grad, call)
                                    : backward_fused(x, rstd, grad, call);
}

bool has_kernel(const Tensor& x, const Call& call) {
  constexpr int64_t kMostOnDevice = 256;
  if (call.path == Path::kDevice && call.spec.head_size > kMostOnDevice) return false;
  const auto type = call.norm.q_weight_H.value().scalar_type();
  return cpu::element_of(x.scalar_type()) && type == call.norm.k_weight_H.value().scalar_type() &&
         (type == x.scalar_type() || type == call.wide());
}

void check(const Tensor& x, const QkNorm& norm, int64_t query_heads, const RopeSpec& spec) {
  CAPSTAN_CHECK(query_heads >= 0 && query_heads <= spec.heads, "qk_norm: {} of {} heads are q",
                query_heads, spec.heads);
  for (const Param& weight : {norm.q_weight_H, norm.k_weight_H})
    CAPSTAN_CHECK(weight.value().numel() == spec.head_size,
                  "qk_norm: weight {} of {} elements for heads of {}", weight.spec().name,
                  weight.value().numel(), spec.head_size);
  CAPSTAN_CHECK(x.scalar_type() == norm.q_weight_H.compute_dtype(),
                "qk_norm: queries and keys are not of the compute dtype of {}",
                norm.q_weight_H.spec().name);
}

}  // namespace

Tensor qk_norm_rope(const Tensor& x_in, const Tensor& positions, const QkNorm& norm,
                    int64_t query_heads, const RopeSpec& spec) {
  check(x_in, norm, query_heads, spec);
  Call call{norm, query_heads, spec, check_rope(x_in, positions, spec), path_of(x_in)};
  if (!has_kernel(x_in, call)) call.path = Path::kReference;
  const std::vector<Param> params{norm.q_weight_H, norm.k_weight_H};
  const bool in_place = !needs_backward({x_in}, params);
  const Tensor x = x_in.detach();
  Tensor out, rstd;
  {
    at::NoGradGuard no_grad;
    out = in_place ? x : at::empty_like(x);
    rstd = forward(x, out, call);
    if (!in_place && call.width() < x.size(2))
      out.narrow(2, call.width(), x.size(2) - call.width())
          .copy_(x.narrow(2, call.width(), x.size(2) - call.width()));
  }
  NodeSpec node{"qk_norm_rope", {x_in}, params, {x_in, rstd}, {}};
  node.backward = [call](const Tensors& saved, Tensors& grads) -> Tensors {
    at::NoGradGuard no_grad;
    const Tensor grad = own_or_copy(std::move(grads[0]));
    backward(saved[0], saved[1], grad, call);
    return {grad};
  };
  return record(out, std::move(node));
}

}  // namespace capstan::ops
