// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Serial loops on ranges, compiled once per instruction set. Multiplications and additions are
// never contracted (-ffp-contract=off) and sums run in fixed lanes, so all variants give the same
// bits. Memory per element of AdamW on fp32: reads 16 bytes, writes 12 (+ 2 with a copy); with bf16
// moments 12 and 8, with 8-bit ones 10 and 6. Lion has one moment less, Sophia
// only reads its second.
#pragma once
#include <cstdint>

#include "capstan/kernels/dynamic_code.h"

namespace capstan::optim::cpu {

inline constexpr double kTinyCurvature = 1e-15;  // Sophia: keeps 0 / 0 away

template <class T>
struct Factors {
  T gradient_scale, decay;  // decay = 1 - lr * weight_decay, or 1
  T beta1, rest1, beta2, rest2;
  T step_size;     // AdamW: lr / (1 - beta1^t); Lion: lr
  T inverse_root;  // 1 / sqrt(1 - beta2^t); these two AdamW only
  T eps;
  T rho;                // Sophia
  uint64_t seed, step;  // bf16 moments
};

// h <- b2 h + weight g^2 with g = gradient_scale x gradient.
template <class T>
struct CurvatureFactors {
  T gradient_scale, weight, beta2;
  uint64_t seed, step;  // bf16 and 8-bit h
};

// Lion has no second moment.
template <class T, class Gradient, class Moment = T>
struct Range {
  T* weights;
  const Gradient* gradient;
  Moment *first, *second;
  int64_t count;
  uint64_t index;  // of the first element, bf16 moments
};

// count: whole blocks; a scale for each.
template <class Gradient>
struct BlockRange {
  float* weights;
  const Gradient* gradient;
  uint8_t *first, *second;
  float *first_scale, *second_scale;
  int64_t count;
};
// scale: of 8-bit h, which comes in whole blocks.
template <class T, class Gradient, class Moment = T>
struct CurvatureRange {
  const Gradient* gradient;
  Moment* h;
  float* scale;
  int64_t count;
  uint64_t index;  // of the first element, bf16 and 8-bit h
};
inline constexpr int64_t kBlock = 256;

template <class T, class Gradient, class Moment = T>
using Update = void (*)(const Range<T, Gradient, Moment>&, const Factors<T>&);
template <class Gradient>
using BlockUpdate = void (*)(const BlockRange<Gradient>&, const Factors<float>&,
                             const kernels::MomentCodes&);

template <class T, class Gradient, class Moment = T>
using Curvature = void (*)(const CurvatureRange<T, Gradient, Moment>&, const CurvatureFactors<T>&);
template <class Gradient>
using BlockCurvature = void (*)(const CurvatureRange<float, Gradient, uint8_t>&,
                                const CurvatureFactors<float>&, const kernels::DynamicCode&);

// Types of weights, gradients and moments; bf16 as its bits.
struct UpdateKernels {
  Update<double, double> f64;
  Update<float, float> f32;
  Update<float, uint16_t> bf16_gradient;
  Update<float, float, uint16_t> bf16_moments;
  Update<float, uint16_t, uint16_t> bf16_gradient_and_moments;
  BlockUpdate<float> blocks;
  BlockUpdate<uint16_t> blocks_bf16_gradient;
};
struct CurvatureKernels {
  Curvature<double, double> f64;
  Curvature<float, float> f32;
  Curvature<float, uint16_t> bf16_gradient;
  Curvature<float, float, uint16_t> bf16_moments;
  Curvature<float, uint16_t, uint16_t> bf16_gradient_and_moments;
  BlockCurvature<float> blocks;
  BlockCurvature<uint16_t> blocks_bf16_gradient;
};

struct Kernels {
  UpdateKernels adamw, lion, sophia;
  CurvatureKernels curvature;
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
