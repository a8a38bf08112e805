// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW on flat buffers, in one pass: w <- w (1 - lr decay); m <- b1 m + (1 - b1) g;
// v <- b2 v + (1 - b2) g^2; w <- w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps).
// Memory per element, fp32 with bf16 copy: 16 bytes read, 14 written; with bf16 moments 12 and 10.
// Reference: src/optim/cpu/loops.inc; fp32 gives its bits as long as b^t does.
#include "optimizer_tile.cuh"

namespace capstan::kernels {
namespace {

template <class A>
struct AdamWUpdate {
  static constexpr bool kHasSecond = true;
  A gradient_scale, decay, beta1, rest1, beta2, rest2, step_size, inverse_root, eps;

  AdamWUpdate() = default;
  __device__ AdamWUpdate(const OptimizerArgs& a, const StepState& s)
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

}  // namespace

void adamw(const OptimizerArgs& args, Stream stream) {
  if (!check_optimizer("adamw", args)) return;
  check_present("adamw", {{"second", args.second}});
  launch_update<AdamWUpdate>("adamw", args, stream);
}

}  // namespace capstan::kernels
