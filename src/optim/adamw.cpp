// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/adamw.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "capstan/base/check.h"
#include "optim/cpu/kernels.h"

namespace capstan::optim {
namespace {

// Elements per task: the four streams of a task stay in the second-level cache between the update
// and the rounding of the copy.
constexpr int64_t kTaskElements = 16384;

template <class T>
cpu::AdamWFactors<T> factors_of(const AdamWStep& step, bool decay) {
  const auto t = static_cast<double>(step.count);
  const double bias1 = 1.0 - std::pow(step.beta1, t), bias2 = 1.0 - std::pow(step.beta2, t);
  return {static_cast<T>(step.gradient_scale),
          static_cast<T>(decay ? 1.0 - step.lr * step.weight_decay : 1.0),
          static_cast<T>(step.beta1),
          static_cast<T>(1.0 - step.beta1),
          static_cast<T>(step.beta2),
          static_cast<T>(1.0 - step.beta2),
          static_cast<T>(step.lr / bias1),
          static_cast<T>(1.0 / std::sqrt(bias2)),
          static_cast<T>(step.eps)};
}

void check_tensors(const AdamWJob& job) {
  const AdamWTensors& t = *job.tensors;
  const auto dtype = t.weights.scalar_type();
  CAPSTAN_CHECK(dtype == at::kFloat || dtype == at::kDouble, "AdamW on {} weights",
                c10::toString(dtype));
  const auto check = [&](const Tensor& x, const char* name, bool dtype_fits) {
    CAPSTAN_CHECK(x.is_contiguous() && x.numel() == t.weights.numel() && dtype_fits,
                  "AdamW: {} has {} elements of {}, weights {} of {}", name, x.numel(),
                  c10::toString(x.scalar_type()), t.weights.numel(), c10::toString(dtype));
  };
  check(t.first, "first moment", t.first.scalar_type() == dtype);
  check(t.second, "second moment", t.second.scalar_type() == dtype);
  const auto gradient = t.gradient.scalar_type();
  check(t.gradient, "gradient",
        gradient == dtype || (dtype == at::kFloat && gradient == at::kBFloat16));
  if (t.copy.defined()) {
    const auto copy = t.copy.scalar_type();
    check(t.copy, "copy", dtype == at::kFloat && (copy == at::kBFloat16 || copy == at::kHalf));
  }
  CAPSTAN_CHECK(0 <= job.begin && job.begin <= job.end && job.end <= t.weights.numel(),
                "AdamW on [{}, {}) of {} elements", job.begin, job.end, t.weights.numel());
}

template <class T, class Gradient>
cpu::AdamWRange<T, Gradient> range_of(const AdamWJob& job) {
  const AdamWTensors& t = *job.tensors;
  return {t.weights.data_ptr<T>() + job.begin,
          static_cast<const Gradient*>(t.gradient.const_data_ptr()) + job.begin,
          t.first.data_ptr<T>() + job.begin, t.second.data_ptr<T>() + job.begin,
          job.end - job.begin};
}

void round_range(const Tensor& weights, const Tensor& copy, int64_t begin, int64_t count) {
  const float* from = weights.const_data_ptr<float>() + begin;
  if (copy.scalar_type() == at::kBFloat16) {
    cpu::kernels().to_bf16(from, static_cast<uint16_t*>(copy.data_ptr()) + begin, count);
    return;
  }
  auto* to = copy.data_ptr<at::Half>() + begin;
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<at::Half>(from[i]);
}

void run(const AdamWJob& task, const AdamWStep& step) {
  const AdamWTensors& t = *task.tensors;
  const auto& k = cpu::kernels();
  if (t.weights.scalar_type() == at::kDouble) {
    k.adamw_f64(range_of<double, double>(task), factors_of<double>(step, task.decay));
    return;
  }
  const auto factors = factors_of<float>(step, task.decay);
  if (t.gradient.scalar_type() == at::kFloat)
    k.adamw_f32(range_of<float, float>(task), factors);
  else
    k.adamw_f32_bf16_gradient(range_of<float, uint16_t>(task), factors);
  if (t.copy.defined()) round_range(t.weights, t.copy, task.begin, task.end - task.begin);
}

// The same formula by ATen, for other devices.
void run_by_aten(const AdamWJob& job, const AdamWStep& step) {
  const AdamWTensors& t = *job.tensors;
  const auto part = [&](const Tensor& x) { return x.narrow(0, job.begin, job.end - job.begin); };
  const auto factors = factors_of<double>(step, job.decay);
  const Tensor weights = part(t.weights), first = part(t.first), second = part(t.second);
  const Tensor g = part(t.gradient).to(weights.scalar_type()) * factors.gradient_scale;
  first.mul_(factors.beta1).add_(g, factors.one_minus_beta1);
  second.mul_(factors.beta2).addcmul_(g, g, factors.one_minus_beta2);
  weights.mul_(factors.decay);
  weights.addcdiv_(first, second.sqrt().mul_(factors.inverse_root).add_(factors.eps),
                   -factors.step_size);
  if (t.copy.defined()) part(t.copy).copy_(weights);
}

}  // namespace

void adamw_update(std::span<const AdamWJob> jobs, const AdamWStep& step) {
  CAPSTAN_CHECK(step.count >= 1, "AdamW update number {}", step.count);
  std::vector<AdamWJob> tasks;
  for (const AdamWJob& job : jobs) {
    check_tensors(job);
    if (!job.tensors->weights.is_cpu()) {
      run_by_aten(job, step);
      continue;
    }
    for (int64_t begin = job.begin; begin < job.end; begin += kTaskElements)
      tasks.push_back({job.tensors, begin, std::min(job.end, begin + kTaskElements), job.decay});
  }
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(tasks[static_cast<size_t>(i)], step);
  });
}

void round_to_copy(const Tensor& weights, const Tensor& copy) {
  CAPSTAN_CHECK(weights.scalar_type() == at::kFloat && weights.numel() == copy.numel() &&
                    (copy.scalar_type() == at::kBFloat16 || copy.scalar_type() == at::kHalf),
                "rounding {} {} to {} {}", weights.numel(), c10::toString(weights.scalar_type()),
                copy.numel(), c10::toString(copy.scalar_type()));
  at::parallel_for(0, weights.numel(), kTaskElements, [&](int64_t begin, int64_t end) {
    round_range(weights, copy, begin, end - begin);
  });
}

}  // namespace capstan::optim
