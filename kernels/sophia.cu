// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Sophia-G on flat buffers: m <- b1 m + (1 - b1) g; w <- w (1 - lr decay) - lr clip(m / (rho h +
// 1e-15), 1), with the curvature h as second moment (Liu et al., "Sophia: A Scalable Stochastic
// Second-order Optimizer for Language Model Pre-training", 2023, algorithm 3).
// Memory per element, fp32 with bf16 copy: 16 bytes read, 10 written; with bf16 moments 12 and 8,
// with 8-bit ones 10 and 7, scales 3/64 more.
// Reference: src/optim/cpu/loops.inc, the same bits.
#include "optimizer_block.cuh"

namespace capstan::kernels {
namespace {

template <class A>
struct SophiaUpdate {
  static constexpr bool kHasSecond = true, kReadsSecondOnly = true;
  A gradient_scale, decay, beta1, rest1, rho, tiny, lr;

  SophiaUpdate() = default;
  template <class Args>
  __device__ SophiaUpdate(const Args& a, const StepState& s)
      : gradient_scale(static_cast<A>(s.gradient_scale)),
        decay(static_cast<A>(1.0 - s.lr * a.weight_decay)),
        beta1(static_cast<A>(a.beta1)),
        rest1(static_cast<A>(1.0 - a.beta1)),
        rho(static_cast<A>(a.rho)),
        tiny(static_cast<A>(1e-15)),
        lr(static_cast<A>(s.lr)) {}

  __device__ __forceinline__ void operator()(Element<A>& e, bool decays) const {
    const A g = e.gradient * gradient_scale;
    e.first = e.first * beta1 + g * rest1;
    const A quotient = e.first / (e.second * rho + tiny);
    const A least = quotient < A(-1) ? A(-1) : quotient;
    e.weight = e.weight * (decays ? decay : A(1)) - lr * (least > A(1) ? A(1) : least);
  }
};

}  // namespace

void sophia(const OptimizerArgs& args, Stream stream) {
  if (!check_optimizer("sophia", args)) return;
  check_present("sophia", {{"second", args.second}});
  launch_update<SophiaUpdate>("sophia", args, stream);
}

void sophia_blockwise(const BlockwiseArgs& args, Stream stream) {
  launch_blockwise<SophiaUpdate>("sophia_blockwise", args, stream);
}

}  // namespace capstan::kernels
