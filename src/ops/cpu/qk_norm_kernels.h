// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernels of qk_norm_rope: serial functions on ranges of rows. Each of the first q_heads + k_heads
// heads of a row: r = 1/sqrt(mean(x^2) + eps); out = x r w, turned by the angles of its position as
// in rope_kernels.h. Backward: g = grad turned back; dx = r g w - x r^3 mean(g w x); dw = sum g x
// r. Memory per element fp32: forward 8 bytes, backward 12.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

struct QkNormArgs {
  const void* x;
  void* out;           // may be x; backward: the gradient of out, becomes that of x
  int64_t row_stride;  // elements, of x and out
  int64_t q_heads, k_heads, head_size;
  const void *q_weight, *k_weight;
  void* rstd;                // [rows, heads], fp32 (fp64 for fp64)
  const void *cos, *sin;     // [positions, head_size / 2], of the same type
  const int64_t* positions;  // of each row; null: row % rows_per_sample
  int64_t rows_per_sample;
  double eps;
  void* partial;  // [groups, 2, head_size] of the weights' gradients, or null
  int64_t rows, rows_per_group;
};

// The weights have the type of x or, in the second half, the type of rstd.
struct QkNormKernels {  // indexed by that, Element
  void (*forward[2][3])(const QkNormArgs&, int64_t row_begin, int64_t row_end);
  void (*backward[2][3])(const QkNormArgs&, int64_t group_begin, int64_t group_end);
};

extern const QkNormKernels qk_norm_plain, qk_norm_avx2, qk_norm_avx512, qk_norm_avx512bf16;
[[nodiscard]] const QkNormKernels& qk_norm_kernels();

}  // namespace capstan::ops::cpu
