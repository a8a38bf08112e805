// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Small matrix products out of packed operands: C (+)= A B, A read by two strides (so that A^T
// needs no copy), B in panels of kPanel columns, [panel][k][kPanel]. A tile of C stays in registers
// over the whole of k.
#pragma once
#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

// 32 registers: 12 x 2 accumulators; 16 registers: 6 x 2.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
template <class S>
constexpr int kPanel = 2 * kLanes<S>;

template <class S>
struct Operands {
  const S* a;
  int64_t a_row, a_k;  // strides of A
  const S* b;          // one panel
  S* c;
  int64_t c_row;
  int64_t depth;
  bool add;  // to what C holds
};

template <int kRows, class S>
CAPSTAN_INLINE void tile(const Operands<S>& o) {
  using V = VecOf<S>;
  constexpr int kWidth = kLanes<S>;
  V c[kRows][2];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    c[m][0] = o.add ? load(o.c + m * o.c_row) : V{};
    c[m][1] = o.add ? load(o.c + m * o.c_row + kWidth) : V{};
  }
  const S* a = o.a;
  const S* b = o.b;
  for (int64_t k = 0; k < o.depth; ++k, a += o.a_k, b += kPanel<S>) {
    const V b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const V x = splat(a[m * o.a_row]);
      c[m][0] += x * b0;
      c[m][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    store(o.c + m * o.c_row, c[m][0]);
    store(o.c + m * o.c_row + kWidth, c[m][1]);
  }
}

template <int kRows, class S>
CAPSTAN_INLINE void last_tile(int64_t rows, const Operands<S>& o) {
  if (rows == kRows) return tile<kRows, S>(o);
  if constexpr (kRows > 1) last_tile<kRows - 1, S>(rows, o);
}

// C [rows, panels * kPanel] (+)= A [rows, depth] B.
template <class S>
struct Multiplication {
  int64_t rows, panels, depth;
  const S* a;
  int64_t a_row, a_k;  // strides of A
  const S* b;
  int64_t b_panel;  // distance of B's panels
  S* c;
  int64_t c_row;
  bool add;
};
template <class S>
__attribute__((noinline)) void multiply(const Multiplication<S>& x) {
  for (int64_t p = 0; p < x.panels; ++p) {
    Operands<S> o{x.a,     x.a_row, x.a_k, x.b + p * x.b_panel, x.c + p * kPanel<S>,
                  x.c_row, x.depth, x.add};
    int64_t m = 0;
    for (; m + kTileRows <= x.rows; m += kTileRows) {
      tile<kTileRows, S>(o);
      o.a += kTileRows * x.a_row;
      o.c += kTileRows * x.c_row;
    }
    if (m < x.rows) last_tile<kTileRows - 1, S>(x.rows - m, o);
  }
}

template <class S>
CAPSTAN_INLINE int64_t panels_of(int64_t columns) {
  return (columns + kPanel<S> - 1) / kPanel<S>;
}

// `count` rows of `width` elements, `stride` apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, count, width;
};

// Rows x -> B operand of x^T: panels over rows, [panel][width][kPanel].
template <class T, class S = ScalarOf<T>>
void pack_transposed(const Rows<T>& x, S* out) {
  constexpr int kP = kPanel<S>;
  for (int64_t first = 0; first < x.count; first += kP, out += x.width * kP) {
    const int64_t n = x.count - first < kP ? x.count - first : kP;
    for (int64_t i = 0; i < n; ++i) {
      const T* const row = x.data + (first + i) * x.stride;
      for (int64_t d = 0; d < x.width; ++d) out[d * kP + i] = to_scalar(row[d]);
    }
    for (int64_t i = n; i < kP; ++i)
      for (int64_t d = 0; d < x.width; ++d) out[d * kP + i] = 0;
  }
}

// Rows x, zero rows up to `padded` -> B operand of x: panels over columns, [panel][padded][kPanel].
template <class T, class S = ScalarOf<T>>
void pack_columns(const Rows<T>& x, int64_t padded, S* out) {
  constexpr int kP = kPanel<S>, kWidth = kLanes<S>;
  for (int64_t first = 0; first < x.width; first += kP) {
    const int64_t left = x.width - first;
    for (int64_t i = 0; i < x.count; ++i, out += kP) {
      const T* const row = x.data + i * x.stride + first;
      store(out, load_part(row, left));
      store(out + kWidth, left > kWidth ? load_part(row + kWidth, left - kWidth) : VecOf<S>{});
    }
    for (int64_t i = x.count; i < padded; ++i, out += kP) {
      store(out, VecOf<S>{});
      store(out + kWidth, VecOf<S>{});
    }
  }
}

// Rows x times `scale` -> A operand, [count][width].
template <class T, class S = ScalarOf<T>>
void pack_rows(const Rows<T>& x, S scale, S* out) {
  for (int64_t i = 0; i < x.count; ++i, out += x.width)
    for (int64_t d = 0; d < x.width; d += kLanes<S>)
      store_part(out + d, load_part(x.data + i * x.stride + d, x.width - d) * scale, x.width - d);
}

}  // namespace
}  // namespace capstan::ops::cpu
