// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernel of RoPE in place: serial, on a range of rows. Each of the first `heads` heads of a row is
// rotated by the angles of its position: (a, b) -> (a cos - b sin, b cos + a sin), a and b the
// halves of the head. 8 bytes per element fp32.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

struct RopeArgs {
  void* x;
  int64_t row_stride;  // elements
  int64_t heads, head_size;
  const void *cos, *sin;     // [positions, head_size / 2], fp32 (fp64 for fp64)
  const int64_t* positions;  // of each row; null: row % rows_per_sample
  int64_t rows_per_sample;
  bool backward;  // rotates the other way
};

struct RopeKernels {  // indexed by Element
  void (*rotate[3])(const RopeArgs&, int64_t row_begin, int64_t row_end);
};

extern const RopeKernels rope_plain, rope_avx2, rope_avx512, rope_avx512bf16;
[[nodiscard]] const RopeKernels& rope_kernels();

}  // namespace capstan::ops::cpu
