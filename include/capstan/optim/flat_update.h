// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW, Lion and Sophia on flat memory: one pass reads gradient, weights and moments once and
// writes weights, moments and the copy in compute dtype. Per element, with the gradient g already
// scaled:
//   w <- w (1 - lr weight_decay)             only where decay is set (decoupled)
// AdamW (Loshchilov and Hutter, 2019):
//   m <- b1 m + (1 - b1) g                   v <- b2 v + (1 - b2) g^2
//   w <- w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
// Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2):
//   w <- w - lr sign(b1 m + (1 - b1) g)      m <- b2 m + (1 - b2) g
// Sophia-G (Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
// Pre-training", 2023, algorithm 3; no bias correction), with the curvature h as second moment:
//   m <- b1 m + (1 - b1) g                   w <- w - lr clip(m / (rho h + 1e-15), 1)
// and beside the updates, with gradients g' of the mean loss of B tokens on labels drawn from the
// model (algorithm 2):  h <- b2 h + (1 - b2) B g'^2
// Moments may be narrower than the weights; the numbers of this update are not rounded before w is
// made:
//   bf16  rounded stochastically by bits of (seed, t, index of the element in the model)
//   8 bit blocks of 256 elements, each with its largest moment as fp32 scale and a byte of the
//         dynamic code per element (capstan/kernels/dynamic_code.h), the nearest; h between two
//         numbers by random bits as above
// The same bits for every thread count and instruction set.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

namespace capstan::optim {

using at::Tensor;

enum class UpdateRule { kAdamW, kLion, kSophia };

struct FlatStep {
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  double rho = 0;             // Sophia
  double gradient_scale = 1;  // clip factor / loss scale, folded into the pass
  int64_t count = 1;          // number of this update, from 1 (bias correction, random bits)
  uint64_t seed = 0;          // of the bits that round bf16 moments
};

// 1-d contiguous tensors of equal length, on one device. weights: fp32 or fp64. gradient: that
// dtype, or bf16 beside fp32. Moments: that of the weights, or beside fp32 bf16 or bytes; second is
// undefined with Lion. Scales of 8-bit moments: fp32, one per 256 elements, else undefined. copy:
// bf16 or fp16 beside fp32, or undefined.
struct FlatTensors {
  Tensor weights, gradient, first, second, copy;
  Tensor first_scale = {}, second_scale = {};  // of moments that there are
};
// Elements [begin, end) of the tensors; whole blocks of 8-bit moments.
struct FlatJob {
  const FlatTensors* tensors = nullptr;
  int64_t begin = 0, end = 0;
  bool decay = true;
  uint64_t index = 0;  // of the first element in the model; bf16 moments and 8-bit curvature
};

// All jobs in one parallel region. Jobs do not overlap.
void update_flat(UpdateRule rule, std::span<const FlatJob> jobs, const FlatStep& step);

struct CurvatureStep {
  double beta2 = 0.99;
  double tokens = 1;          // B
  double gradient_scale = 1;  // g' is this times the gradient of the jobs
  int64_t count = 0;          // updates so far; with the seed: of the bits that round a narrow h
  uint64_t seed = 0;
};
// Sophia's curvature out of gradients g'. An element whose g' is not finite keeps its own. Jobs as
// in update_flat.
void update_curvature(std::span<const FlatJob> jobs, const CurvatureStep& step);

// copy <- weights, rounded to nearest even; the conversion that update_flat does on the way.
void round_to_copy(const Tensor& weights, const Tensor& copy);

}  // namespace capstan::optim
