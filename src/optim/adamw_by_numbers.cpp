// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "optim/adamw_by_numbers_internal.h"

#include <ATen/ATen.h>

namespace capstan::optim {
namespace {

// What all elements share, fp64 without dims.
struct Shared {
  Tensor applies, scale, decay, step_size, inverse_root;
};

Shared shared_of(const AdamWStep& constants, const StepNumbers& numbers) {
  const Tensor count = numbers.count.to(at::kDouble);
  const auto bias = [&](double beta) { return at::pow(beta, count).neg().add(1.0); };
  return {.applies = numbers.skip.eq(0),
          .scale = numbers.gradient_scale,
          .decay = numbers.lr.mul(-constants.weight_decay).add(1.0),
          .step_size = numbers.lr / bias(constants.beta1),
          .inverse_root = bias(constants.beta2).rsqrt()};
}

void update(const AdamWJob& job, const AdamWStep& constants, const Shared& shared) {
  const AdamWTensors& t = *job.tensors;
  const auto part = [&](const Tensor& x) { return x.narrow(0, job.begin, job.end - job.begin); };
  const Tensor weights = part(t.weights), first = part(t.first), second = part(t.second);
  // What a skipped step computes may be NaN and is dropped.
  const auto assign = [&](const Tensor& to, const Tensor& value) {
    to.copy_(at::where(shared.applies, value, to));
  };
  const Tensor g = part(t.gradient).to(weights.scalar_type()).mul(shared.scale);
  assign(first, first.mul(constants.beta1).add(g, 1.0 - constants.beta1));
  assign(second, second.mul(constants.beta2).addcmul(g, g, 1.0 - constants.beta2));
  const Tensor root = second.sqrt().mul(shared.inverse_root).add(constants.eps);
  const Tensor decayed = job.decay ? weights.mul(shared.decay) : weights;
  assign(weights, decayed.sub(first.div(root).mul(shared.step_size)));
  if (t.copy.defined()) part(t.copy).copy_(weights);
}

}  // namespace

void adamw_by_numbers(std::span<const AdamWJob> jobs, const AdamWStep& constants,
                      const StepNumbers& numbers) {
  const Shared shared = shared_of(constants, numbers);
  for (const AdamWJob& job : jobs) update(job, constants, shared);
}

}  // namespace capstan::optim
