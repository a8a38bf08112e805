// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernels of the emulated fp8 casts: serial functions on runs of elements, the same bits on every
// instruction set. out = fp8(x scale) to nearest even, saturating; NaN becomes 0x7f. Memory per
// element: x read, one byte written.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

struct Fp8Kernels {
  // Of |x|; NaN does not count. Indexed by Element (fp32, bf16).
  float (*largest[2])(const void* x, int64_t count);
  // Indexed by Element and by Fp8Format.
  void (*cast[2][2])(const void* x, uint8_t* out, int64_t count, float scale);
};

extern const Fp8Kernels fp8_plain, fp8_avx2, fp8_avx512, fp8_avx512bf16;
[[nodiscard]] const Fp8Kernels& fp8_kernels();

}  // namespace capstan::ops::cpu
