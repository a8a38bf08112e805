// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What becomes of a step, decided by one warp: norm, clip factor, skip, count, the loss scale of
// the next step. Reads both windows of spikes. Reference: src/engine/step_control.cpp.
#include "capstan/kernels/optimizer.h"
#include "dispatch.h"
#include "numbers.cuh"

namespace capstan::kernels {
namespace {

constexpr double kLargest = 1.7976931348623157e308;

// NaN is not.
__device__ __forceinline__ bool is_finite(double x) { return fabs(x) <= kLargest; }

// Above it a value is a spike: infinite before half the window is known. Sums go from the oldest
// value to the newest.
__device__ double spike_limit(const SpikeRule& rule, const double* values, int64_t taken) {
  const int64_t known = taken < rule.window ? taken : rule.window;
  const int64_t needed = rule.window / 2 > 2 ? rule.window / 2 : 2;
  if (known < needed) return HUGE_VAL;
  const int64_t oldest = taken < rule.window ? 0 : taken % rule.window;
  const auto at = [&](int64_t i) {
    const int64_t place = oldest + i;
    return values[place < rule.window ? place : place - rule.window];
  };
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < known; ++i) mean += at(i) / static_cast<double>(known);
  for (int64_t i = 0; i < known; ++i) squares += (at(i) - mean) * (at(i) - mean);
  const double deviation = root_of(squares / static_cast<double>(known - 1));
  const double size = fabs(mean) > 1.0 ? fabs(mean) : 1.0;
  const double least = 1e-6 * size;
  return mean + rule.sigma * (deviation > least ? deviation : least);
}

__device__ void rescale(const LossScaleRule& rule, bool broken, StepState& s) {
  if (rule.interval == 0) return;
  if (!broken && ++s.good_steps < rule.interval) return;
  const double scale = s.loss_scale * (broken ? rule.backoff : rule.growth);
  if (broken)
    s.loss_scale = scale > rule.smallest ? scale : rule.smallest;
  else
    s.loss_scale = scale < rule.largest ? scale : rule.largest;
  s.good_steps = 0;
}

__global__ void decide(const DecideStepArgs a) {
  __shared__ double limits[2];
  StepState& s = *a.state;
  const StepSums sums = *a.sums;
  const auto self = static_cast<int>(threadIdx.x);
  if (a.spikes.window > 0 && self < 2)
    limits[self] = spike_limit(a.spikes, a.windows + self * a.spikes.window, s.taken);
  __syncthreads();
  if (self != 0) return;
  s.norm = root_of(sums.squares) / s.loss_scale;
  const double clip = a.max_norm > 0 ? a.max_norm / (s.norm + 1e-6) : 1.0;
  s.gradient_scale = (clip < 1.0 ? clip : 1.0) / s.loss_scale;
  const bool broken = sums.non_finite_loss != 0 || sums.non_finite_gradient != 0 ||
                      !is_finite(sums.loss) || !is_finite(s.norm);  // finite parts may overflow
  bool skips = broken || *a.is_void != 0;
  if (a.spikes.window > 0 && !skips) {
    double* const loss = a.windows + s.taken % a.spikes.window;
    loss[0] = sums.loss < limits[0] ? sums.loss : limits[0];
    loss[a.spikes.window] = s.norm < limits[1] ? s.norm : limits[1];
    skips = sums.loss > limits[0] || s.norm > limits[1];
    ++s.taken;
  }
  s.skip = skips ? 1 : 0;
  if (!skips) ++s.count;
  rescale(a.loss_scale, broken, s);
}

}  // namespace

void decide_step(const DecideStepArgs& args, Stream stream) {
  check_sizes("decide_step", {args.spikes.window, args.loss_scale.interval});
  check_present("decide_step",
                {{"sums", args.sums}, {"is_void", args.is_void}, {"state", args.state}});
  if (args.spikes.window > 0) check_present("decide_step", {{"windows", args.windows}});
  launch("decide_step", {1, kWarp, 0}, stream, decide, args);
}

}  // namespace capstan::kernels
