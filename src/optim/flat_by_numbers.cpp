// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "optim/flat_by_numbers_internal.h"

#include <ATen/ATen.h>

#include "optim/cpu/kernels.h"

namespace capstan::optim {
namespace {

// What all elements share, fp64 without dims.
struct Shared {
  Tensor applies, scale, decay, lr, step_size, inverse_root;
};

Shared shared_of(const FlatStep& constants, const StepNumbers& numbers) {
  const Tensor count = numbers.count.to(at::kDouble);
  const auto bias = [&](double beta) { return at::pow(beta, count).neg().add(1.0); };
  return {.applies = numbers.skip.eq(0),
          .scale = numbers.gradient_scale,
          .decay = numbers.lr.mul(-constants.weight_decay).add(1.0),
          .lr = numbers.lr,
          .step_size = numbers.lr / bias(constants.beta1),
          .inverse_root = bias(constants.beta2).rsqrt()};
}

// One job's part of the tensors.
struct Part {
  [[nodiscard]] Tensor of(const Tensor& x) const {
    return x.narrow(0, job.begin, job.end - job.begin);
  }
  [[nodiscard]] Tensor gradient() const {
    return of(job.tensors->gradient).to(job.tensors->weights.scalar_type()).mul(shared.scale);
  }
  [[nodiscard]] Tensor decayed() const {
    const Tensor weights = of(job.tensors->weights);
    return job.decay ? weights.mul(shared.decay) : weights;
  }
  // What a skipped step computes may be NaN and is dropped.
  void assign(const Tensor& to, const Tensor& value) const {
    to.copy_(at::where(shared.applies, value, to));
  }

  const FlatJob& job;
  const FlatStep& constants;
  const Shared& shared;
};

void update_adamw(const Part& p) {
  const FlatTensors& t = *p.job.tensors;
  const Tensor first = p.of(t.first), second = p.of(t.second), g = p.gradient();
  p.assign(first, first.mul(p.constants.beta1).add(g, 1.0 - p.constants.beta1));
  p.assign(second, second.mul(p.constants.beta2).addcmul(g, g, 1.0 - p.constants.beta2));
  const Tensor root = second.sqrt().mul(p.shared.inverse_root).add(p.constants.eps);
  p.assign(p.of(t.weights), p.decayed().sub(first.div(root).mul(p.shared.step_size)));
}

void update_lion(const Part& p) {
  const FlatTensors& t = *p.job.tensors;
  const Tensor first = p.of(t.first), g = p.gradient();
  const Tensor mixed = first.mul(p.constants.beta1).add(g, 1.0 - p.constants.beta1);
  p.assign(p.of(t.weights), p.decayed().sub(mixed.sign().mul(p.shared.lr)));
  p.assign(first, first.mul(p.constants.beta2).add(g, 1.0 - p.constants.beta2));
}

void update_sophia(const Part& p) {
  const FlatTensors& t = *p.job.tensors;
  const Tensor first = p.of(t.first), g = p.gradient();
  p.assign(first, first.mul(p.constants.beta1).add(g, 1.0 - p.constants.beta1));
  const Tensor curvature = p.of(t.second).mul(p.constants.rho).add(cpu::kTinyCurvature);
  p.assign(p.of(t.weights), p.decayed().sub(first.div(curvature).clamp(-1, 1).mul(p.shared.lr)));
}

void update(UpdateRule rule, const Part& part) {
  switch (rule) {
    case UpdateRule::kAdamW:
      return update_adamw(part);
    case UpdateRule::kLion:
      return update_lion(part);
    case UpdateRule::kSophia:
      return update_sophia(part);
  }
}

}  // namespace

void flat_by_numbers(UpdateRule rule, std::span<const FlatJob> jobs, const FlatStep& constants,
                     const StepNumbers& numbers) {
  const Shared shared = shared_of(constants, numbers);
  for (const FlatJob& job : jobs) {
    const Part part{job, constants, shared};
    update(rule, part);
    const Tensor& copy = job.tensors->copy;
    if (copy.defined()) part.of(copy).copy_(part.of(job.tensors->weights));
  }
}

}  // namespace capstan::optim
