// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// out = a b (+ out) of bf16 matrices with an fp32 result, which LibTorch does not have on CPUs.
// Both factors are packed in panels first, 32 rows of a or 32 columns of b with zeros behind the
// edges; then blocks of the result are independent of each other. Every number is summed along k in
// the same order, whatever the threads.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

inline constexpr int64_t kPanelSide = 32;  // rows or columns of a panel; its depth is padded to it
// A block of the result: panels of a by panels of b, which the second-level cache keeps.
inline constexpr int64_t kBlockRowPanels = 4, kBlockColumnPanels = 8;

// Strides in elements; one of them is 1.
struct PairMatrix {
  const uint16_t* data;
  int64_t row, column;
};

struct ProductArgs {
  int64_t rows, columns, depth;
  PairMatrix a, b;                // [rows, depth], [depth, columns]
  uint16_t *panels_a, *panels_b;  // 64-byte aligned, panels_of(rows) and panels_of(columns) of them
  float* out;                     // columns adjacent
  int64_t out_row;
  bool adds;
};

constexpr int64_t panels_of(int64_t side) { return (side + kPanelSide - 1) / kPanelSide; }
constexpr int64_t panel_elements(int64_t depth) {
  return panels_of(depth) * kPanelSide * kPanelSide;
}
constexpr int64_t blocks_of(const ProductArgs& x) {
  return ((panels_of(x.rows) + kBlockRowPanels - 1) / kBlockRowPanels) *
         ((panels_of(x.columns) + kBlockColumnPanels - 1) / kBlockColumnPanels);
}

struct ProductKernels {
  using Kernel = void (*)(const ProductArgs&, int64_t begin, int64_t end);
  Kernel pack;      // panels of a, then those of b
  Kernel multiply;  // blocks
};
extern const ProductKernels product_amx;
// Null below AMX.
[[nodiscard]] const ProductKernels* product_kernels();

}  // namespace capstan::ops::cpu
