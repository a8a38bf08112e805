// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernels of add_rms_norm: serial functions on ranges of contiguous rows. s = residual + hidden; r
// = 1/sqrt(mean(s^2) + eps); normed = s r w. Backward: g = grad w; ds = r g - s r^3 mean(g s); dw =
// sum grad s r. Memory per element fp32: forward 16 bytes, backward 16.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

struct NormForwardArgs {
  const void *residual, *hidden,
      *weight;  // hidden may be null: then sum == residual and is only read
  void *sum, *normed, *rstd;
  int64_t width;
  double eps;
};
struct NormBackwardArgs {
  const void *x, *rstd, *weight, *grad;
  void* dx;  // residual dtype
  bool add_to_dx;
  void* d_hidden;  // compute dtype copy of dx, or null
  void* partial;   // [groups, width] of the weight's gradient, or null
  int64_t rows, width, rows_per_group;
};

// The weight has the compute type or, in the second half, the residual's.
enum class NormWeight { kCompute, kResidual };
struct NormKernels {  // indexed by NormWeight, Pair
  void (*forward[2][4])(const NormForwardArgs&, int64_t row_begin, int64_t row_end);
  void (*backward[2][4])(const NormBackwardArgs&, int64_t group_begin, int64_t group_end);
};

extern const NormKernels norm_plain, norm_avx2, norm_avx512, norm_avx512bf16;
[[nodiscard]] const NormKernels& norm_kernels();

}  // namespace capstan::ops::cpu
