// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Products of bf16 matrices with fp32 sums, laid out as instructions for pairs of bf16 read them. A
// pair is two neighbours along k. A in rows, [rows][k]; B in panels of 16 columns,
// [panel][k / 2][column][2]. AVX512-BF16 multiplies pairs of vectors, AMX tiles of 16 x 32 by
// 32 x 16 (Intel SDM, volume 1, chapter 18).
#pragma once
#include <immintrin.h>

#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

constexpr int64_t kPairPanel = 16;
constexpr int64_t kPairSide = 32;  // rows, columns and k are multiples of it

CAPSTAN_INLINE int64_t round_to_side(int64_t n) {
  return (n + kPairSide - 1) / kPairSide * kPairSide;
}

// C [rows, columns] = A [rows, depth] B, added to C if `add`. Distances in elements.
struct PairProduct {
  int64_t rows, columns, depth;
  const uint16_t* a;
  int64_t a_row;
  int64_t a_slab = kPairSide;  // of 32 numbers along k and the next ones
  const uint16_t* b;
  int64_t b_panel;  // distance of B's panels
  float* c;
  int64_t c_row;
  bool add;
};

#if defined(__AMX_BF16__)

// Tiles of the calling thread, all of 16 rows of 64 bytes, while it lives.
struct PairUnit {
  struct alignas(64) Configuration {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  PairUnit() {
    const Configuration configuration;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&configuration);
  }
  PairUnit(const PairUnit&) = delete;
  PairUnit& operator=(const PairUnit&) = delete;
  ~PairUnit() { _tile_release(); }
};

// 32 x 32 of C in four tiles. b0, b1: two panels.
CAPSTAN_INLINE void pair_block(const PairProduct& x, const uint16_t* a, const uint16_t* b,
                               float* c) {
  const int64_t a_bytes = x.a_row * 2, c_bytes = x.c_row * 4;
  if (x.add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 16 * x.c_row, c_bytes);
    _tile_loadd(3, c + 16 * x.c_row + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < x.depth; k += kPairSide, a += x.a_slab) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b + k * kPairPanel, 64);
    _tile_loadd(7, b + x.b_panel + k * kPairPanel, 64);
    _tile_loadd(5, a + 16 * x.a_row, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 16 * x.c_row, c_bytes);
  _tile_stored(3, c + 16 * x.c_row + 16, c_bytes);
}

#else

struct PairUnit {};

// 8 x 32 of C in sixteen registers.
CAPSTAN_INLINE void pair_rows(const PairProduct& x, const uint16_t* a, const uint16_t* b,
                              float* c) {
  constexpr int kRows = 8;
  __m512 sums[kRows][2];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    sums[m][0] = x.add ? _mm512_loadu_ps(c + m * x.c_row) : _mm512_setzero_ps();
    sums[m][1] = x.add ? _mm512_loadu_ps(c + m * x.c_row + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < x.depth; k += 2) {
    const auto b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + k * kPairPanel));
    const auto b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + x.b_panel + k * kPairPanel));
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, a + m * x.a_row + k / kPairSide * x.a_slab + k % kPairSide,
                       sizeof pair);
      const auto a_m = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], a_m, b0);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], a_m, b1);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    _mm512_storeu_ps(c + m * x.c_row, sums[m][0]);
    _mm512_storeu_ps(c + m * x.c_row + 16, sums[m][1]);
  }
}

CAPSTAN_INLINE void pair_block(const PairProduct& x, const uint16_t* a, const uint16_t* b,
                               float* c) {
  for (int64_t m = 0; m < kPairSide; m += 8) pair_rows(x, a + m * x.a_row, b, c + m * x.c_row);
}

#endif

// The compiler does not know that tile instructions read and write memory: hence the barriers.
__attribute__((noinline)) void multiply(const PairProduct& x) {
  asm volatile("" ::: "memory");
  for (int64_t n = 0; n < x.columns; n += kPairSide)
    for (int64_t m = 0; m < x.rows; m += kPairSide)
      pair_block(x, x.a + m * x.a_row, x.b + n / kPairPanel * x.b_panel, x.c + m * x.c_row + n);
  asm volatile("" ::: "memory");
}

}  // namespace
}  // namespace capstan::ops::cpu
