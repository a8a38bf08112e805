// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A panel of a is [k / 32][32 rows][32], that of b two panels of pair_product.h: tiles of 1 KiB, in
// the order in which they are read.
#include "ops/cpu/product_kernels.h"

#include "ops/cpu/pair_operands.h"

namespace capstan::ops::cpu {
namespace {

constexpr int64_t kTile = kPairPanel * kPairSide;  // elements
static_assert(kPanelSide == kPairSide);

// What a panel is made of: rows of a or columns of b, from one on.
struct Strip {
  const uint16_t* data;
  int64_t side, depth;  // how many there are
  int64_t side_stride, depth_stride;
  bool is_a;
  [[nodiscard]] bool runs_along_depth() const { return depth_stride == 1; }
};

// 32 lines of 32 adjacent numbers.
struct Square {
  const uint16_t* data;
  int64_t line;
};

// The strip's square at k. One that hangs over an edge is copied between zeros, and so is one whose
// pairs have no common alignment.
CAPSTAN_INLINE Square square_at(const Strip& strip, int64_t k, uint16_t* copy) {
  const uint16_t* const from = strip.data + k * strip.depth_stride;
  const bool along = strip.runs_along_depth();
  const int64_t depth = strip.depth - k, line = along ? strip.side_stride : strip.depth_stride;
  if (strip.side >= kPairSide && depth >= kPairSide && line % 2 == 0) return {from, line};
  __builtin_memset(copy, 0, kPairSide * kPairSide * sizeof *copy);
  const int64_t lines = along ? strip.side : depth, length = along ? depth : strip.side;
  for (int64_t i = 0; i < lines && i < kPairSide; ++i)
    __builtin_memcpy(copy + i * kPairSide, from + i * line,
                     static_cast<size_t>(length < kPairSide ? length : kPairSide) * sizeof *copy);
  return {copy, kPairSide};
}

// 16 lines along k.
CAPSTAN_INLINE void pack_along(bool is_a, const uint16_t* from, int64_t line, uint16_t* tile) {
  if (!is_a) return transpose_16(pairs_at(from), line / 2, pairs_at(tile), kPairPanel);
  for (int64_t i = 0; i < kPairPanel; ++i)
    __builtin_memcpy(tile + i * kPairSide, from + i * line, kPairSide * sizeof *tile);
}

// 16 numbers of each of 32 lines across k.
CAPSTAN_INLINE void pack_across(bool is_a, const uint16_t* from, int64_t line, uint16_t* tile) {
  alignas(64) uint16_t transposed[kTile];
  uint16_t* const pairs = is_a ? transposed : tile;
  for (int64_t i = 0; i < kPairPanel; ++i) {
    const uint16_t* const low = from + 2 * i * line;
    const VecU32 both = load_widened(low) | load_widened(low + line) << 16;
    __builtin_memcpy(pairs + i * kPairSide, &both, sizeof both);
  }
  if (is_a) transpose_16(pairs_at(pairs), kPairPanel, pairs_at(tile), kPairPanel);
}

CAPSTAN_INLINE void pack_strip(const Strip& strip, uint16_t* panel) {
  alignas(64) uint16_t copy[kPairSide * kPairSide];
  const int64_t half_b = panel_elements(strip.depth) / 2;
  for (int64_t k = 0; k < strip.depth; k += kPairSide) {
    const Square s = square_at(strip, k, copy);
    uint16_t* const first = panel + k * (strip.is_a ? kPairSide : kPairPanel);
    uint16_t* const second = first + (strip.is_a ? kTile : half_b);
    if (strip.runs_along_depth()) {
      pack_along(strip.is_a, s.data, s.line, first);
      pack_along(strip.is_a, s.data + kPairPanel * s.line, s.line, second);
    } else {
      pack_across(strip.is_a, s.data, s.line, first);
      pack_across(strip.is_a, s.data + kPairPanel, s.line, second);
    }
  }
}

void pack(const ProductArgs& x, int64_t begin, int64_t end) {
  const int64_t of_a = panels_of(x.rows), elements = panel_elements(x.depth);
  for (int64_t i = begin; i < end && i < of_a; ++i) {
    const int64_t first = i * kPairSide;
    pack_strip({x.a.data + first * x.a.row, x.rows - first, x.depth, x.a.row, x.a.column, true},
               x.panels_a + i * elements);
  }
  for (int64_t i = begin > of_a ? begin - of_a : 0; i < end - of_a; ++i) {
    const int64_t first = i * kPairSide;
    pack_strip(
        {x.b.data + first * x.b.column, x.columns - first, x.depth, x.b.column, x.b.row, false},
        x.panels_b + i * elements);
  }
}

// 32 x 32 sums to rows m and columns n of the result.
CAPSTAN_INLINE void put_sums(const ProductArgs& x, int64_t m, int64_t n, const float* sums) {
  float* out = x.out + m * x.out_row + n;
  for (int64_t r = 0; r < kPairSide && m + r < x.rows; ++r, out += x.out_row, sums += kPairSide)
    for (int64_t c = 0; c < kPairSide && n + c < x.columns; c += kPairPanel) {
      const int64_t count = x.columns - n - c;
      const VecF32 sum = load(sums + c);
      store_part(out + c, x.adds ? sum + load_part(out + c, count) : sum, count);
    }
}

CAPSTAN_INLINE void multiply_block(const ProductArgs& x, int64_t first_row, int64_t first_column) {
  alignas(64) float sums[kPairSide * kPairSide];
  const int64_t depth = panels_of(x.depth) * kPairSide;
  const int64_t row_end = first_row + kBlockRowPanels * kPairSide;
  const int64_t column_end = first_column + kBlockColumnPanels * kPairSide;
  for (int64_t m = first_row; m < row_end && m < x.rows; m += kPairSide)
    for (int64_t n = first_column; n < column_end && n < x.columns; n += kPairSide) {
      multiply({.rows = kPairSide,
                .columns = kPairSide,
                .depth = depth,
                .a = x.panels_a + m * depth,
                .a_row = kPairSide,
                .a_slab = kPairSide * kPairSide,
                .b = x.panels_b + n * depth,
                .b_panel = kPairPanel * depth,
                .c = sums,
                .c_row = kPairSide,
                .add = false});
      put_sums(x, m, n, sums);
    }
}

void multiply_blocks(const ProductArgs& x, int64_t begin, int64_t end) {
  const int64_t down = (panels_of(x.rows) + kBlockRowPanels - 1) / kBlockRowPanels;
  [[maybe_unused]] const PairUnit unit;
  for (int64_t i = begin; i < end; ++i)
    multiply_block(x, i % down * kBlockRowPanels * kPairSide,
                   i / down * kBlockColumnPanels * kPairSide);
}

}  // namespace

const ProductKernels product_amx = {pack, multiply_blocks};

}  // namespace capstan::ops::cpu
