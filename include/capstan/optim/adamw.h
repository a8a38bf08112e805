// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW on flat memory: one pass reads gradient, weights and moments once and writes weights,
// moments and the copy in compute dtype. Per element, with the gradient g already scaled:
//   w <- w (1 - lr weight_decay)             only where decay is set (decoupled)
//   m <- b1 m + (1 - b1) g                   v <- b2 v + (1 - b2) g^2
//   w <- w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
// The same bits for every thread count and instruction set.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

namespace capstan::optim {

using at::Tensor;

struct AdamWStep {
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  double gradient_scale = 1;  // clip factor / loss scale, folded into the pass
  int64_t count = 1;          // number of this update, from 1 (bias correction)
};

// 1-d contiguous tensors of equal length, on one device. weights and moments: fp32 or fp64.
// gradient: that dtype, or bf16 beside fp32. copy: bf16 or fp16 beside fp32, or undefined.
struct AdamWTensors {
  Tensor weights, gradient, first, second, copy;
};
// Elements [begin, end) of the tensors.
struct AdamWJob {
  const AdamWTensors* tensors = nullptr;
  int64_t begin = 0, end = 0;
  bool decay = true;
};
// All jobs in one parallel region. Jobs do not overlap.
void adamw_update(std::span<const AdamWJob> jobs, const AdamWStep& step);

// copy <- weights, rounded to nearest even; the conversion that adamw_update does on the way.
void round_to_copy(const Tensor& weights, const Tensor& copy);

}  // namespace capstan::optim
