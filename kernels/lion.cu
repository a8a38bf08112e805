// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Lion on flat buffers: w <- w (1 - lr decay) - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g
// (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023).
// Memory per element, fp32 with bf16 copy: 12 bytes read, 10 written; with a bf16 moment 10 and 8,
// with an 8-bit one 9 and 7, scales 1/32 more.
// Reference: src/optim/cpu/loops.inc, the same bits.
#include "optimizer_block.cuh"

namespace capstan::kernels {
namespace {

template <class A>
struct LionUpdate {
  static constexpr bool kHasSecond = false, kReadsSecondOnly = false;
  A gradient_scale, decay, beta1, rest1, beta2, rest2, lr;

  LionUpdate() = default;
  template <class Args>
  __device__ LionUpdate(const Args& a, const StepState& s)
      : gradient_scale(static_cast<A>(s.gradient_scale)),
        decay(static_cast<A>(1.0 - s.lr * a.weight_decay)),
        beta1(static_cast<A>(a.beta1)),
        rest1(static_cast<A>(1.0 - a.beta1)),
        beta2(static_cast<A>(a.beta2)),
        rest2(static_cast<A>(1.0 - a.beta2)),
        lr(static_cast<A>(s.lr)) {}

  __device__ __forceinline__ void operator()(Element<A>& e, bool decays) const {
    const A g = e.gradient * gradient_scale;
    const A direction = e.first * beta1 + g * rest1;
    const A sign = direction > A(0) ? A(1) : (direction < A(0) ? A(-1) : A(0));
    e.first = e.first * beta2 + g * rest2;
    e.weight = e.weight * (decays ? decay : A(1)) - lr * sign;
  }
};

}  // namespace

void lion(const OptimizerArgs& args, Stream stream) {
  if (!check_optimizer("lion", args)) return;
  launch_update<LionUpdate>("lion", args, stream);
}

void lion_blockwise(const BlockwiseArgs& args, Stream stream) {
  launch_blockwise<LionUpdate>("lion_blockwise", args, stream);
}

}  // namespace capstan::kernels
