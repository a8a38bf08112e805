// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernels of swiglu: serial functions on ranges of rows [gate | up] of 2F elements. s =
// sigmoid(gate); out = gate s up; d_up = grad gate s; d_gate = grad up s (1 + gate (1 - s)). Memory
// per output element fp32: forward 12 bytes, backward 20.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

struct SwigluArgs {
  const void *gate_up, *grad;  // grad: backward only
  void* out;                   // [rows, F] forward, [rows, 2F] backward
  int64_t features;            // F
};

struct SwigluKernels {  // indexed by Element
  void (*forward[3])(const SwigluArgs&, int64_t row_begin, int64_t row_end);
  void (*backward[3])(const SwigluArgs&, int64_t row_begin, int64_t row_end);
};

extern const SwigluKernels swiglu_plain, swiglu_avx2, swiglu_avx512, swiglu_avx512bf16;
[[nodiscard]] const SwigluKernels& swiglu_kernels();

}  // namespace capstan::ops::cpu
