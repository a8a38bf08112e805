// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW on one element; its factors out of the state of a step.
#pragma once
#include "optimizer_tile.cuh"

namespace capstan::kernels {

template <class A>
struct AdamWUpdate {
  static constexpr bool kHasSecond = true, kReadsSecondOnly = false;
  A gradient_scale, decay, beta1, rest1, beta2, rest2, step_size, inverse_root, eps;

  AdamWUpdate() = default;
  template <class Args>
  __device__ AdamWUpdate(const Args& a, const StepState& s)
      : gradient_scale(static_cast<A>(s.gradient_scale)),
        decay(static_cast<A>(1.0 - s.lr * a.weight_decay)),
        beta1(static_cast<A>(a.beta1)),
        rest1(static_cast<A>(1.0 - a.beta1)),
        beta2(static_cast<A>(a.beta2)),
        rest2(static_cast<A>(1.0 - a.beta2)),
        step_size(static_cast<A>(s.lr / (1.0 - integer_power(a.beta1, s.count)))),
        inverse_root(static_cast<A>(1.0 / root_of(1.0 - integer_power(a.beta2, s.count)))),
        eps(static_cast<A>(a.eps)) {}

  __device__ __forceinline__ void operator()(Element<A>& e, bool decays) const {
    const A g = e.gradient * gradient_scale;
    e.first = e.first * beta1 + g * rest1;
    e.second = e.second * beta2 + (g * g) * rest2;
    e.weight = e.weight * (decays ? decay : A(1)) -
               step_size * (e.first / (root_of(e.second) * inverse_root + eps));
  }
};

}  // namespace capstan::kernels
