// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernels of add_layer_norm: serial functions on ranges of contiguous rows. s = residual + hidden;
// m = mean(s); r = 1/sqrt(mean((s - m)^2) + eps); h = (s - m) r; normed = h w + b. Backward: g =
// grad w; ds = r (g - mean(g) - h mean(g h)); dw = sum grad h; db = sum grad. Memory per element
// fp32: forward 16 bytes, backward 16.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

struct LayerNormForwardArgs {
  const void *residual, *hidden;  // hidden may be null: then sum == residual and is only read
  const void *weight, *bias;      // of one type
  void *sum, *normed, *mean, *rstd;
  int64_t width;
  double eps;
};
struct LayerNormBackwardArgs {
  const void *x, *mean, *rstd, *weight, *grad;
  void* dx;  // residual dtype
  bool add_to_dx;
  void* d_hidden;  // compute dtype copy of dx, or null
  void* partial;   // [groups, 2, width] of the gradients of weight and bias, or null
  int64_t rows, width, rows_per_group;
};

// The weight has the compute type or, in the second half, the residual's (NormWeight).
struct LayerNormKernels {  // indexed by NormWeight, Pair
  void (*forward[2][4])(const LayerNormForwardArgs&, int64_t row_begin, int64_t row_end);
  void (*backward[2][4])(const LayerNormBackwardArgs&, int64_t group_begin, int64_t group_end);
};

extern const LayerNormKernels layer_norm_plain, layer_norm_avx2, layer_norm_avx512,
    layer_norm_avx512bf16;
[[nodiscard]] const LayerNormKernels& layer_norm_kernels();

}  // namespace capstan::ops::cpu
