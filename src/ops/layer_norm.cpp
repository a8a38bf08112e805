// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: N tokens, D hidden features.
#include "capstan/ops/layer_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/ops/path.h"
#include "ops/cpu/dtypes.h"
#include "ops/cpu/layer_norm_kernels.h"
#include "ops/cpu/norm_kernels.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

// The gradients of weight and bias are summed per group of rows, then over groups: the same bits
// for any number of threads.
constexpr int64_t kRowsPerGroup = 64;

struct LayerNormCall {
  Param weight, bias;
  double eps;
  at::ScalarType residual_dtype, compute_dtype;
  bool has_hidden;
  Path path;

  [[nodiscard]] bool trains() const { return weight.trainable() || bias.trainable(); }
  [[nodiscard]] at::ScalarType wide() const {
    return residual_dtype == at::kDouble ? at::kDouble : at::kFloat;
  }
  // Of a backward that is to write both.
  [[nodiscard]] bool has_two_dtypes() const {
    return has_hidden && residual_dtype != compute_dtype;
  }
};

struct Forward {
  Tensor residual, normed, mean, rstd;
};

Forward forward_reference(const Tensor& residual, const Tensor& hidden, const LayerNormCall& call) {
  const auto wide = call.wide();
  const Tensor sum = hidden.defined()
                         ? (residual.to(wide) + hidden.to(wide)).to(call.residual_dtype)
                         : residual.detach();
  const Tensor x = sum.to(wide), mean = x.mean(-1, true);
  const Tensor rstd = at::rsqrt((x - mean).square().mean(-1, true) + call.eps);
  const Tensor normed =
      (x - mean) * rstd * call.weight.value().to(wide) + call.bias.value().to(wide);
  return {sum, normed.to(call.compute_dtype), mean, rstd};
}

void add_gradients(const LayerNormCall& call, const Tensor& dw, const Tensor& db) {
  call.weight.accumulate([dw](param::GradSlot& slot) { param::add_to_slot(slot, dw); });
  call.bias.accumulate([db](param::GradSlot& slot) { param::add_to_slot(slot, db); });
}

struct Saved {
  Tensor x, mean, rstd;
};

// Each backward gives the gradients of residual and hidden and adds those of weight and bias.
Tensors backward_reference(const Saved& saved, const Tensor& grad_residual,
                           const Tensor& grad_normed, const LayerNormCall& call) {
  const auto wide = call.wide();
  const Tensor h = (saved.x.to(wide) - saved.mean) * saved.rstd, grad = grad_normed.to(wide);
  const auto sum_rows = [](const Tensor& t) { return t.reshape({-1, t.size(-1)}).sum(0); };
  if (call.trains()) add_gradients(call, sum_rows(grad * h), sum_rows(grad));
  const Tensor g = grad * call.weight.value().to(wide);
  Tensor dx = saved.rstd * (g - g.mean(-1, true) - h * (g * h).mean(-1, true));
  if (grad_residual.defined()) dx = dx + grad_residual.to(wide);
  return {dx.to(call.residual_dtype), call.has_hidden ? dx.to(call.compute_dtype) : Tensor()};
}

Forward empty_results(const Tensor& residual, bool has_hidden, const LayerNormCall& call) {
  std::vector<int64_t> statistics = residual.sizes().vec();
  statistics.back() = 1;
  const auto wide = residual.options().dtype(call.wide());
  return {has_hidden ? at::empty_like(residual) : residual.detach(),
          at::empty(residual.sizes(), residual.options().dtype(call.compute_dtype)),
          at::empty(statistics, wide), at::empty(statistics, wide)};
}

const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

size_t weight_kind(const LayerNormCall& call) {
  const bool is_compute = call.weight.value().scalar_type() == call.compute_dtype;
  return static_cast<size_t>(is_compute ? cpu::NormWeight::kCompute : cpu::NormWeight::kResidual);
}
size_t dtype_index(const LayerNormCall& call) {
  return static_cast<size_t>(*cpu::dtype_pair(call.residual_dtype, call.compute_dtype));
}

Forward forward_fused(const Tensor& residual, const Tensor& hidden, const LayerNormCall& call) {
  const Tensor weight = call.weight.value(), bias = call.bias.value();
  const int64_t width = residual.size(-1), rows = residual.numel() / width;
  Forward out = empty_results(residual, hidden.defined(), call);
  const cpu::LayerNormForwardArgs args{.residual = read(residual),
                                       .hidden = read(hidden),
                                       .weight = read(weight),
                                       .bias = read(bias),
                                       .sum = write(out.residual),
                                       .normed = write(out.normed),
                                       .mean = write(out.mean),
                                       .rstd = write(out.rstd),
                                       .width = width,
                                       .eps = call.eps};
  const auto kernel = cpu::layer_norm_kernels().forward[weight_kind(call)][dtype_index(call)];
  at::parallel_for(0, rows, cpu::grain(width),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensors backward_fused(const Saved& saved, Tensor grad_residual, const Tensor& grad_normed,
                       const LayerNormCall& call) {
  const Tensor weight = call.weight.value();
  const int64_t width = saved.x.size(-1), rows = saved.x.numel() / width;
  const bool adds = grad_residual.defined();
  const Tensor dx = adds ? own_or_copy(std::move(grad_residual)) : at::empty_like(saved.x);
  const Tensor d_hidden = call.has_two_dtypes() ? at::empty_like(grad_normed) : Tensor();
  const int64_t groups = (rows + kRowsPerGroup - 1) / kRowsPerGroup;
  const Tensor partial =
      call.trains() ? at::empty({groups, 2, width}, saved.rstd.options()) : Tensor();
  const cpu::LayerNormBackwardArgs args{.x = read(saved.x),
                                        .mean = read(saved.mean),
                                        .rstd = read(saved.rstd),
                                        .weight = read(weight),
                                        .grad = read(grad_normed),
                                        .dx = write(dx),
                                        .add_to_dx = adds,
                                        .d_hidden = write(d_hidden),
                                        .partial = write(partial),
                                        .rows = rows,
                                        .width = width,
                                        .rows_per_group = kRowsPerGroup};
  const auto kernel = cpu::layer_norm_kernels().backward[weight_kind(call)][dtype_index(call)];
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (partial.defined()) {
    const Tensor sums = partial.sum(0);
    add_gradients(call, sums[0], sums[1]);
  }
  if (!call.has_hidden) return {dx, Tensor()};
  return {dx, call.has_two_dtypes() ? d_hidden : dx};
}

kernels::NormTypes device_types(const LayerNormCall& call) {
  return {*on_device::dtype_of(call.residual_dtype), *on_device::dtype_of(call.compute_dtype),
          *on_device::dtype_of(call.weight.value())};
}

Forward forward_on_device(const Tensor& residual, const Tensor& hidden, const LayerNormCall& call) {
  const Tensor weight = call.weight.value(), bias = call.bias.value();
  const int64_t width = residual.size(-1);
  Forward out = empty_results(residual, hidden.defined(), call);
  device_kernels()->layer_norm_forward({.types = device_types(call),
                                        .shape = {residual.numel() / width, width},
                                        .eps = call.eps,
                                        .residual = read(residual),
                                        .hidden = read(hidden),
                                        .weight = read(weight),
                                        .bias = read(bias),
                                        .sum = hidden.defined() ? write(out.residual) : nullptr,
                                        .normed = write(out.normed),
                                        .mean = write(out.mean),
                                        .rstd = write(out.rstd)},
                                       on_device::stream());
  return out;
}

Tensors backward_on_device(const Saved& saved, Tensor grad_residual, const Tensor& grad_normed,
                           const LayerNormCall& call) {
  const Tensor weight = call.weight.value();
  const int64_t width = saved.x.size(-1), rows = saved.x.numel() / width;
  const bool adds = grad_residual.defined();
  const Tensor dx = adds ? own_or_copy(std::move(grad_residual)) : at::empty_like(saved.x);
  const Tensor d_hidden = call.has_two_dtypes() ? at::empty_like(grad_normed) : Tensor();
  const auto wide = saved.rstd.options();
  const Tensor sums = call.trains() ? at::zeros({2, width}, wide) : Tensor();
  const Tensor partial =
      call.trains() ? at::empty({2, device_kernels()->norm_partial_rows(rows), width}, wide)
                    : Tensor();
  const Tensor dw = call.trains() ? sums[0] : Tensor(), db = call.trains() ? sums[1] : Tensor();
  device_kernels()->layer_norm_backward({.types = device_types(call),
                                         .shape = {rows, width},
                                         .x = read(saved.x),
                                         .mean = read(saved.mean),
                                         .rstd = read(saved.rstd),
                                         .weight = read(weight),
                                         .grad = read(grad_normed),
                                         .grad_residual = adds ? read(dx) : nullptr,
                                         .dx = write(dx),
                                         .d_hidden = write(d_hidden),
                                         .grad_weight = write(dw),
                                         .grad_bias = write(db),
                                         .partial = write(partial)},
                                        on_device::stream());
  if (call.trains()) add_gradients(call, dw, db);
  if (!call.has_hidden) return {dx, Tensor()};
  return {dx, call.has_two_dtypes() ? d_hidden : dx};
}

Tensors backward(const LayerNormCall& call, const Saved& saved, Tensors& grads) {
  at::NoGradGuard no_grad;
  if (!grads[1].defined())  // the normed output was not used
    return {grads[0], call.has_hidden ? grads[0].to(call.compute_dtype) : Tensor()};
  const Tensor grad_normed = grads[1].contiguous();
  if (call.path == Path::kReference) return backward_reference(saved, grads[0], grad_normed, call);
  return call.path == Path::kDevice
             ? backward_on_device(saved, std::move(grads[0]), grad_normed, call)
             : backward_fused(saved, std::move(grads[0]), grad_normed, call);
}

Forward forward(const Tensor& residual_in, const Tensor& hidden_in, const LayerNormCall& call) {
  at::NoGradGuard no_grad;
  if (call.path == Path::kReference) return forward_reference(residual_in, hidden_in, call);
  const Tensor residual = residual_in.contiguous();
  const Tensor hidden = hidden_in.defined() ? hidden_in.contiguous() : Tensor();
  return call.path == Path::kDevice ? forward_on_device(residual, hidden, call)
                                    : forward_fused(residual, hidden, call);
}

// The kernels know weight and bias in one type, of the compute or the residual dtype.
bool has_kernel(const LayerNormCall& call) {
  const auto weight = call.weight.value().scalar_type();
  return cpu::dtype_pair(call.residual_dtype, call.compute_dtype) &&
         weight == call.bias.value().scalar_type() &&
         (weight == call.compute_dtype || weight == call.residual_dtype);
}

void check_shapes(const Tensor& residual, const Tensor& hidden, const Param& weight,
                  const Param& bias) {
  for (const Param& param : {weight, bias})
    CAPSTAN_CHECK(residual.dim() >= 1 && param.value().numel() == residual.size(-1),
                  "add_layer_norm: {} has {} elements for {} features", param.spec().name,
                  param.value().numel(), residual.size(-1));
  CAPSTAN_CHECK(!hidden.defined() || hidden.sizes() == residual.sizes(),
                "add_layer_norm: hidden and residual differ in shape");
  CAPSTAN_CHECK(!hidden.defined() || hidden.scalar_type() == weight.compute_dtype(),
                "add_layer_norm: hidden is not of the compute dtype of {}", weight.spec().name);
}

}  // namespace

AddLayerNorm add_layer_norm(const Tensor& residual, const Tensor& hidden, const Param& weight,
                            const Param& bias, double eps, NormOutput output) {
  check_shapes(residual, hidden, weight, bias);
  LayerNormCall call{.weight = weight,
                     .bias = bias,
                     .eps = eps,
                     .residual_dtype = residual.scalar_type(),
                     .compute_dtype = weight.compute_dtype(),
                     .has_hidden = hidden.defined(),
                     .path = path_of(residual)};
  if (!has_kernel(call)) call.path = Path::kReference;
  const Forward out = forward(residual, hidden, call);
  NodeSpec node{.name = "add_layer_norm",
                .inputs = {residual, hidden},
                .params = {weight, bias},
                .saved = {out.residual, out.mean, out.rstd},
                .backward = {}};
  node.backward = [call](const Tensors& saved, Tensors& grads) {
    return backward(call, {saved[0], saved[1], saved[2]}, grads);
  };
  if (output == NormOutput::kRemade)  // the sum is its own norm's input
    node.remake = {1, [call](const Tensors& saved) { return forward(saved[0], {}, call).normed; }};
  record(Tensors{out.residual, out.normed}, std::move(node));
  return {out.residual, out.normed};
}

}  // namespace capstan::ops
