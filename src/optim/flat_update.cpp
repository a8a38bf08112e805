// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/flat_update.h"

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

const char* name_of(UpdateRule rule) {
  return rule == UpdateRule::kAdamW ? "AdamW" : rule == UpdateRule::kLion ? "Lion" : "Sophia";
}

const cpu::UpdateKernels& kernels_of(UpdateRule rule) {
  const cpu::Kernels& all = cpu::kernels();
  return rule == UpdateRule::kAdamW ? all.adamw : rule == UpdateRule::kLion ? all.lion : all.sophia;
}

template <class T>
cpu::Factors<T> factors_of(UpdateRule rule, const FlatStep& step, bool decay) {
  const auto t = static_cast<double>(step.count);
  const bool corrects = rule == UpdateRule::kAdamW;
  const double bias1 = corrects ? 1.0 - std::pow(step.beta1, t) : 1.0,
               bias2 = corrects ? 1.0 - std::pow(step.beta2, t) : 1.0;
  return {static_cast<T>(step.gradient_scale),
          static_cast<T>(decay ? 1.0 - step.lr * step.weight_decay : 1.0),
          static_cast<T>(step.beta1),
          static_cast<T>(1.0 - step.beta1),
          static_cast<T>(step.beta2),
          static_cast<T>(1.0 - step.beta2),
          static_cast<T>(step.lr / bias1),
          static_cast<T>(1.0 / std::sqrt(bias2)),
          static_cast<T>(step.eps),
          static_cast<T>(step.rho),
          step.seed,
          static_cast<uint64_t>(step.count)};
}

void check_tensor(UpdateRule rule, const FlatTensors& t, const Tensor& x, const char* name,
                  bool dtype_fits, int64_t elements_per_value = 1) {
  CAPSTAN_CHECK(x.defined() && x.is_contiguous() &&
                    x.numel() * elements_per_value == t.weights.numel() && dtype_fits,
                "{}: {} has {} elements of {}, weights {} of {}", name_of(rule), name,
                x.defined() ? x.numel() : 0,
                x.defined() ? c10::toString(x.scalar_type()) : "nothing", t.weights.numel(),
                c10::toString(t.weights.scalar_type()));
}

bool in_blocks(const FlatTensors& t) { return t.first.scalar_type() == at::kByte; }

void check_moments(UpdateRule rule, const FlatJob& job) {
  const FlatTensors& t = *job.tensors;
  const auto dtype = t.weights.scalar_type(), moments = t.first.scalar_type();
  const bool has_second = rule != UpdateRule::kLion, blocks = in_blocks(t);
  const bool fits = moments == dtype || (dtype == at::kFloat && moments == at::kBFloat16) ||
                    (dtype == at::kFloat && blocks);
  check_tensor(rule, t, t.first, "first moment", fits);
  CAPSTAN_CHECK(t.second.defined() == has_second, "{} with {} moments", name_of(rule),
                has_second ? 1 : 2);
  if (has_second)
    check_tensor(rule, t, t.second, "second moment", t.second.scalar_type() == moments);
  if (!blocks) return;
  const auto check_scale = [&](const Tensor& scale) {
    check_tensor(rule, t, scale, "scale", scale.defined() && scale.scalar_type() == at::kFloat,
                 cpu::kBlock);
  };
  check_scale(t.first_scale);
  if (has_second) check_scale(t.second_scale);
  CAPSTAN_CHECK(job.begin % cpu::kBlock == 0 && job.end % cpu::kBlock == 0,
                "8-bit moments in [{}, {})", job.begin, job.end);
}

void check_job(UpdateRule rule, const FlatJob& job) {
  const FlatTensors& t = *job.tensors;
  const auto dtype = t.weights.scalar_type();
  CAPSTAN_CHECK(dtype == at::kFloat || dtype == at::kDouble, "{} on {} weights", name_of(rule),
                c10::toString(dtype));
  CAPSTAN_CHECK(0 <= job.begin && job.begin <= job.end && job.end <= t.weights.numel(),
                "{} on [{}, {}) of {} elements", name_of(rule), job.begin, job.end,
                t.weights.numel());
  check_moments(rule, job);
  const auto gradient = t.gradient.scalar_type();
  check_tensor(rule, t, t.gradient, "gradient",
               gradient == dtype || (dtype == at::kFloat && gradient == at::kBFloat16));
  if (!t.copy.defined()) return;
  const auto copy = t.copy.scalar_type();
  check_tensor(rule, t, t.copy, "copy",
               dtype == at::kFloat && (copy == at::kBFloat16 || copy == at::kHalf));
}

template <class T>
T* from(const Tensor& x, int64_t begin) {
  return x.defined() ? static_cast<T*>(x.data_ptr()) + begin : nullptr;
}

template <class Gradient>
const Gradient* gradient_of(const FlatJob& job) {
  return static_cast<const Gradient*>(job.tensors->gradient.const_data_ptr()) + job.begin;
}

template <class T, class Gradient, class Moment>
void run_kernel(cpu::Update<T, Gradient, Moment> kernel, const FlatJob& job,
                const cpu::Factors<T>& factors) {
  const FlatTensors& t = *job.tensors;
  kernel(
      {from<T>(t.weights, job.begin), gradient_of<Gradient>(job), from<Moment>(t.first, job.begin),
       from<Moment>(t.second, job.begin), job.end - job.begin, job.index},
      factors);
}

template <class Gradient>
void run_blocks(cpu::BlockUpdate<Gradient> kernel, const FlatJob& job,
                const cpu::Factors<float>& factors) {
  const FlatTensors& t = *job.tensors;
  const int64_t block = job.begin / cpu::kBlock;
  kernel(
      {from<float>(t.weights, job.begin), gradient_of<Gradient>(job),
       from<uint8_t>(t.first, job.begin), from<uint8_t>(t.second, job.begin),
       from<float>(t.first_scale, block), from<float>(t.second_scale, block), job.end - job.begin},
      factors, kernels::kMomentCodes);
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

// On fp32 weights.
void run_fp32(UpdateRule rule, const FlatJob& task, const cpu::Factors<float>& factors) {
  const auto& k = kernels_of(rule);
  const bool narrow_gradient = task.tensors->gradient.scalar_type() == at::kBFloat16;
  const auto moments = task.tensors->first.scalar_type();
  if (moments == at::kByte)
    narrow_gradient ? run_blocks(k.blocks_bf16_gradient, task, factors)
                    : run_blocks(k.blocks, task, factors);
  else if (moments == at::kBFloat16)
    narrow_gradient ? run_kernel(k.bf16_gradient_and_moments, task, factors)
                    : run_kernel(k.bf16_moments, task, factors);
  else
    narrow_gradient ? run_kernel(k.bf16_gradient, task, factors) : run_kernel(k.f32, task, factors);
}

void run(UpdateRule rule, const FlatJob& task, const FlatStep& step) {
  const FlatTensors& t = *task.tensors;
  if (t.weights.scalar_type() == at::kDouble) {
    run_kernel(kernels_of(rule).f64, task, factors_of<double>(rule, step, task.decay));
    return;
  }
  run_fp32(rule, task, factors_of<float>(rule, step, task.decay));
  if (t.copy.defined()) round_range(t.weights, t.copy, task.begin, task.end - task.begin);
}

void check_type_of_aten(const FlatTensors& t) {
  CAPSTAN_CHECK(t.first.scalar_type() == t.weights.scalar_type(),
                "{} moments off the CPU need our kernels", c10::toString(t.first.scalar_type()));
}

// The same formulas by ATen, for other devices without our kernels.
void run_by_aten(UpdateRule rule, const FlatJob& job, const FlatStep& step) {
  const FlatTensors& t = *job.tensors;
  check_type_of_aten(t);
  const auto part = [&](const Tensor& x) { return x.narrow(0, job.begin, job.end - job.begin); };
  const auto f = factors_of<double>(rule, step, job.decay);
  const Tensor weights = part(t.weights), first = part(t.first);
  const Tensor g = part(t.gradient).to(weights.scalar_type()) * f.gradient_scale;
  if (rule == UpdateRule::kAdamW) {
    const Tensor second = part(t.second);
    first.mul_(f.beta1).add_(g, f.rest1);
    second.mul_(f.beta2).addcmul_(g, g, f.rest2);
    weights.mul_(f.decay);
    weights.addcdiv_(first, second.sqrt().mul_(f.inverse_root).add_(f.eps), -f.step_size);
  } else if (rule == UpdateRule::kSophia) {
    first.mul_(f.beta1).add_(g, f.rest1);
    const Tensor quotient = first / (part(t.second) * f.rho).add_(cpu::kTinyCurvature);
    weights.mul_(f.decay).add_(quotient.clamp_(-1, 1), -f.step_size);
  } else {
    const Tensor direction = (first * f.beta1).add_(g, f.rest1).sign_();
    first.mul_(f.beta2).add_(g, f.rest2);
    weights.mul_(f.decay).add_(direction, -f.step_size);
  }
  if (t.copy.defined()) part(t.copy).copy_(weights);
}

// Cut into what a core takes at a time; on the CPU.
std::vector<FlatJob> tasks_of(std::span<const FlatJob> jobs) {
  std::vector<FlatJob> tasks;
  for (const FlatJob& job : jobs)
    for (int64_t begin = job.begin; begin < job.end; begin += kTaskElements)
      tasks.push_back({job.tensors, begin, std::min(job.end, begin + kTaskElements), job.decay,
                       job.index + static_cast<uint64_t>(begin - job.begin)});
  return tasks;
}

template <class Run>
void run_all(std::span<const FlatJob> jobs, const Run& run) {
  const std::vector<FlatJob> tasks = tasks_of(jobs);
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(tasks[static_cast<size_t>(i)]);
  });
}

template <class T>
cpu::CurvatureFactors<T> factors_of(const CurvatureStep& step) {
  return {static_cast<T>(step.gradient_scale), static_cast<T>((1.0 - step.beta2) * step.tokens),
          static_cast<T>(step.beta2), step.seed, static_cast<uint64_t>(step.count)};
}

template <class T, class Gradient, class Moment>
cpu::CurvatureRange<T, Gradient, Moment> curvature_range(const FlatJob& job) {
  const FlatTensors& t = *job.tensors;
  return {gradient_of<Gradient>(job), from<Moment>(t.second, job.begin),
          from<float>(t.second_scale, job.begin / cpu::kBlock), job.end - job.begin, job.index};
}

template <class Gradient>
void estimate_fp32(const cpu::Curvature<float, Gradient> wide,
                   const cpu::Curvature<float, Gradient, uint16_t> bf16,
                   const cpu::BlockCurvature<Gradient> blocks, const FlatJob& task,
                   const CurvatureStep& step) {
  const auto factors = factors_of<float>(step);
  const auto type = task.tensors->second.scalar_type();
  if (type == at::kByte)
    blocks(curvature_range<float, Gradient, uint8_t>(task), factors, kernels::kMomentCodes.second);
  else if (type == at::kBFloat16)
    bf16(curvature_range<float, Gradient, uint16_t>(task), factors);
  else
    wide(curvature_range<float, Gradient, float>(task), factors);
}

void estimate(const FlatJob& task, const CurvatureStep& step) {
  const cpu::CurvatureKernels& k = cpu::kernels().curvature;
  if (task.tensors->weights.scalar_type() == at::kDouble)
    k.f64(curvature_range<double, double, double>(task), factors_of<double>(step));
  else if (task.tensors->gradient.scalar_type() == at::kBFloat16)
    estimate_fp32(k.bf16_gradient, k.bf16_gradient_and_moments, k.blocks_bf16_gradient, task, step);
  else
    estimate_fp32(k.f32, k.bf16_moments, k.blocks, task, step);
}

constexpr int64_t kCurvatureElements = int64_t{1} << 22;  // at a time, to keep temporaries small

void estimate_by_aten(const FlatJob& job, const CurvatureStep& step) {
  check_type_of_aten(*job.tensors);
  for (int64_t begin = job.begin; begin < job.end; begin += kCurvatureElements) {
    const int64_t count = std::min(kCurvatureElements, job.end - begin);
    const Tensor h = job.tensors->second.narrow(0, begin, count);
    const Tensor g =
        job.tensors->gradient.narrow(0, begin, count).to(h.scalar_type()) * step.gradient_scale;
    const Tensor made = (g * g).mul_(step.tokens * (1.0 - step.beta2)).add_(h, step.beta2);
    h.copy_(at::where(at::isfinite(made), made, h));
  }
}

}  // namespace

void update_curvature(std::span<const FlatJob> jobs, const CurvatureStep& step) {
  std::vector<FlatJob> on_cpu;
  for (const FlatJob& job : jobs) {
    check_job(UpdateRule::kSophia, job);
    job.tensors->weights.is_cpu() ? on_cpu.push_back(job) : estimate_by_aten(job, step);
  }
  run_all(on_cpu, [&](const FlatJob& task) { estimate(task, step); });
}

void update_flat(UpdateRule rule, std::span<const FlatJob> jobs, const FlatStep& step) {
  CAPSTAN_CHECK(step.count >= 1, "{} update number {}", name_of(rule), step.count);
  std::vector<FlatJob> on_cpu;
  for (const FlatJob& job : jobs) {
    check_job(rule, job);
    job.tensors->weights.is_cpu() ? on_cpu.push_back(job) : run_by_aten(rule, job, step);
  }
  run_all(on_cpu, [&](const FlatJob& task) { run(rule, task, step); });
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
