// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Serial loops on ranges, compiled once per instruction set. Multiplications and additions are
// never contracted (-ffp-contract=off) and sums run in fixed lanes, so all variants give the same
// bits. Memory per element of adamw_f32: reads 16 bytes, writes 12 (+ 2 with a copy).
#pragma once
#include <cstdint>

namespace capstan::optim::cpu {

template <class T>
struct AdamWFactors {
  T gradient_scale, decay;  // decay = 1 - lr * weight_decay, or 1
  T beta1, one_minus_beta1, beta2, one_minus_beta2;
  T step_size;     // lr / (1 - beta1^t)
  T inverse_root;  // 1 / sqrt(1 - beta2^t)
  T eps;
};

template <class T, class Gradient>
struct AdamWRange {
  T* weights;
  const Gradient* gradient;
  T *first, *second;
  int64_t count;
};

struct Kernels {
  void (*adamw_f64)(const AdamWRange<double, double>&, const AdamWFactors<double>&);
  void (*adamw_f32)(const AdamWRange<float, float>&, const AdamWFactors<float>&);
  void (*adamw_f32_bf16_gradient)(const AdamWRange<float, uint16_t>&, const AdamWFactors<float>&);
  void (*to_bf16)(const float* from, uint16_t* to, int64_t count);
  double (*squares_f64)(const double* values, int64_t count);
  double (*squares_f32)(const float* values, int64_t count);
  double (*squares_bf16)(const uint16_t* values, int64_t count);
};

namespace plain {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

[[nodiscard]] const Kernels& kernels();  // of device::isa_level()

}  // namespace capstan::optim::cpu
