// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What is done to rows of logits. Legend: N tokens, V vocabulary rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <limits>

#include "capstan/base/check.h"
#include "capstan/ops/head.h"
#include "capstan/ops/path.h"
#include "ops/cpu/cross_entropy_kernels.h"
#include "ops/cpu/dtypes.h"
#include "ops/logits_internal.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

bool takes_kernel(const Tensor& logits) {
  return path_of(logits) == Path::kFused && cpu::element_of(logits.scalar_type()) &&
         logits.stride(1) == 1;
}

cpu::CrossEntropyArgs arguments(const Tensor& logits, const Tensor& targets, int64_t first) {
  return {.logits = logits.data_ptr(),
          .row_stride = logits.stride(0),
          .columns = logits.size(1),
          .first_column = first,
          .targets = targets.const_data_ptr<int64_t>()};
}

void run(cpu::CrossEntropyKernels::Kernel const* kernels, const Tensor& logits,
         const cpu::CrossEntropyArgs& args) {
  const auto kernel = kernels[static_cast<size_t>(*cpu::element_of(logits.scalar_type()))];
  at::parallel_for(0, logits.size(0), cpu::grain(logits.size(1)),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

struct LocalTargets {
  Tensor column_N1, here_N, wanted_N;
};
LocalTargets localize(const Tensor& targets, int64_t first, int64_t columns) {
  const Tensor column = targets - first, wanted = targets.ne(kIgnoreTarget);
  const Tensor here = (column >= 0).logical_and(column < columns).logical_and(wanted);
  return {at::where(here, column, at::zeros_like(column)).unsqueeze(1), here, wanted};
}

LogitStats stats_reference(const Tensor& logits_in, const Tensor& targets, int64_t first) {
  const Tensor logits = logits_in.to(wide_dtype_of(logits_in));
  const auto rows = at::zeros({logits.size(0)}, logits.options());
  if (logits.size(1) == 0)
    return {at::full_like(rows, -std::numeric_limits<double>::infinity()), rows, rows.clone()};
  const LocalTargets local = localize(targets, first, logits.size(1));
  const Tensor top = logits.amax(1);
  return {top, (logits - top.unsqueeze(1)).exp().sum(1),
          at::where(local.here_N, logits.gather(1, local.column_N1).squeeze(1), rows)};
}

void gradient_reference(const Tensor& logits, const Tensor& lse, const Tensor& targets,
                        const Tensor& weights, int64_t first) {
  if (logits.size(1) == 0) return;
  const LocalTargets local = localize(targets, first, logits.size(1));
  Tensor d = (logits.to(lse.scalar_type()) - lse.unsqueeze(1)).exp();
  d.scatter_add_(1, local.column_N1, -local.here_N.to(d.scalar_type()).unsqueeze(1));
  const Tensor scale = at::where(local.wanted_N, weights, at::zeros_like(weights));
  logits.copy_(d * scale.unsqueeze(1));
}

bool is_on_device(const Tensor& logits) {
  return path_of(logits) == Path::kDevice && logits.stride(1) == 1;
}

kernels::LogitRows device_rows(const Tensor& logits, const Tensor& targets, int64_t first) {
  return {.dtype = *on_device::dtype_of(logits),
          .logits = logits.data_ptr(),
          .rows = logits.size(0),
          .columns = logits.size(1),
          .row_stride = logits.stride(0),
          .first_column = first,
          .targets = targets.const_data_ptr<int64_t>()};
}

}  // namespace

at::ScalarType wide_dtype_of(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

LogitStats logit_stats(const Tensor& logits, const Tensor& targets, int64_t first) {
  at::NoGradGuard no_grad;
  const bool device_form = is_on_device(logits);
  if (!device_form && !takes_kernel(logits)) return stats_reference(logits, targets, first);
  const auto options = logits.options().dtype(wide_dtype_of(logits));
  const LogitStats out{at::empty({logits.size(0)}, options), at::empty({logits.size(0)}, options),
                       at::empty({logits.size(0)}, options)};
  if (device_form) {
    device_kernels()->logit_stats({.logits = device_rows(logits, targets, first),
                                   .top = out.top_N.data_ptr(),
                                   .sum = out.sum_N.data_ptr(),
                                   .picked = out.picked_N.data_ptr()},
                                  on_device::stream());
    return out;
  }
  auto args = arguments(logits, targets, first);
  args.top = out.top_N.data_ptr();
  args.sum = out.sum_N.data_ptr();
  args.picked = out.picked_N.data_ptr();
  run(cpu::cross_entropy_kernels().stats, logits, args);
  return out;
}

void logits_to_gradient_(const Tensor& logits, const Tensor& lse, const Tensor& targets,
                         const Tensor& weights, int64_t first) {
  at::NoGradGuard no_grad;
  const bool device_form = is_on_device(logits);
  if (!device_form && !takes_kernel(logits))
    return gradient_reference(logits, lse, targets, weights, first);
  const auto wide = wide_dtype_of(logits);
  CAPSTAN_CHECK(lse.scalar_type() == wide && weights.scalar_type() == wide,
                "logits_to_gradient_: lse and weights must be in the wide dtype");
  if (device_form)
    return device_kernels()->logit_gradient({.logits = device_rows(logits, targets, first),
                                             .lse = lse.const_data_ptr(),
                                             .weights = weights.const_data_ptr()},
                                            on_device::stream());
  auto args = arguments(logits, targets, first);
  args.lse = lse.const_data_ptr();
  args.weights = weights.const_data_ptr();
  run(cpu::cross_entropy_kernels().gradient, logits, args);
}

void cross_entropy_(const Tensor& logits, const Tensor& targets, const Tensor& weights,
                    const Tensor& logprob) {
  at::NoGradGuard no_grad;
  if (is_on_device(logits))
    return device_kernels()->cross_entropy(
        {.logits = device_rows(logits, targets, 0),
         .weights = weights.defined() ? weights.const_data_ptr() : nullptr,
         .logprob = logprob.data_ptr()},
        on_device::stream());
  if (takes_kernel(logits)) {
    auto args = arguments(logits, targets, 0);
    args.weights = weights.defined() ? weights.const_data_ptr() : nullptr;
    args.logprob = logprob.data_ptr();
    return run(cpu::cross_entropy_kernels().fused, logits, args);
  }
  const LogitStats stats = stats_reference(logits, targets, 0);
  const Tensor lse = stats.top_N + stats.sum_N.log();
  logprob.copy_(at::where(targets.ne(kIgnoreTarget), stats.picked_N - lse, at::zeros_like(lse)));
  if (weights.defined()) gradient_reference(logits, lse, targets, weights, 0);
}

}  // namespace capstan::ops
