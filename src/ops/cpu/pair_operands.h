// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Operands of pair products (pair_product.h) out of rows of bf16 or fp32.
#pragma once
#include "ops/cpu/pair_product.h"

namespace capstan::ops::cpu {
namespace {

CAPSTAN_INLINE VecU32 load_numbers(const uint32_t* p) {
  VecU32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// 16 x 16 numbers of 32 bits, transposed; strides in numbers.
CAPSTAN_INLINE void transpose_16(const uint32_t* from, int64_t from_row, uint32_t* to,
                                 int64_t to_row) {
  VecU32 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = load_numbers(from + i * from_row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // 2 x 2 within lanes of 4
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28,
                                   13, 29);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27,
                                       14, 30, 15, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // 4 x 4 within lanes
    const int x = i / 2 * 4 + i % 2, y = i / 2 * 4 + i % 2 * 2;
    r[y] = __builtin_shufflevector(t[x], t[x + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13,
                                   28, 29);
    r[y + 1] = __builtin_shufflevector(t[x], t[x + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27,
                                       14, 15, 30, 31);
  }
  const auto store_to = [&](int row, VecU32 v) {
    __builtin_memcpy(to + row * to_row, &v, sizeof v);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // lanes: even and odd ones of two rows, then of four
#define CAPSTAN_EVEN_LANES 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define CAPSTAN_ODD_LANES 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
    const VecU32 a = __builtin_shufflevector(r[i], r[i + 4], CAPSTAN_EVEN_LANES);
    const VecU32 b = __builtin_shufflevector(r[i], r[i + 4], CAPSTAN_ODD_LANES);
    const VecU32 c = __builtin_shufflevector(r[i + 8], r[i + 12], CAPSTAN_EVEN_LANES);
    const VecU32 d = __builtin_shufflevector(r[i + 8], r[i + 12], CAPSTAN_ODD_LANES);
    store_to(i, __builtin_shufflevector(a, c, CAPSTAN_EVEN_LANES));
    store_to(i + 4, __builtin_shufflevector(b, d, CAPSTAN_EVEN_LANES));
    store_to(i + 8, __builtin_shufflevector(a, c, CAPSTAN_ODD_LANES));
    store_to(i + 12, __builtin_shufflevector(b, d, CAPSTAN_ODD_LANES));
#undef CAPSTAN_EVEN_LANES
#undef CAPSTAN_ODD_LANES
  }
}

CAPSTAN_INLINE uint32_t* pairs_at(uint16_t* p) { return reinterpret_cast<uint32_t*>(p); }
CAPSTAN_INLINE const uint32_t* pairs_at(const uint16_t* p) {
  return reinterpret_cast<const uint32_t*>(p);
}

// 16 numbers of 16 bits, as 32 bits each.
CAPSTAN_INLINE VecU32 load_widened(const void* p) {
  VecU16 half;
  __builtin_memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, VecU32);
}

// fp32 numbers, rounded, as the low (kHalf 0) or high numbers of 16 pairs; the low ones come first
// and clear the high ones.
template <int kHalf>
CAPSTAN_INLINE void put_half(uint16_t* pairs, VecF32 x) {
  Bf16 rounded[kPairPanel];
  store(rounded, x);
  VecU32 bits = load_widened(rounded);
  if constexpr (kHalf == 1) bits = load_numbers(pairs_at(pairs)) | bits << 16;
  __builtin_memcpy(pairs, &bits, sizeof bits);
}

// Rows X [n][width] -> B operand of X^T, [n / 16][width / 2][16][2].
inline void pack_pairs_transposed(const uint16_t* rows, int64_t n, int64_t width, uint16_t* out) {
  for (int64_t first = 0; first < n; first += kPairPanel)
    for (int64_t d = 0; d < width; d += kPairSide, out += kPairSide * kPairPanel)
      transpose_16(pairs_at(rows + first * width + d), width / 2, pairs_at(out), kPairPanel);
}

// Rows X [n][width] -> B operand of X, [width / 16][n / 2][16][2].
inline void pack_pairs(const uint16_t* rows, int64_t n, int64_t width, uint16_t* out) {
  for (int64_t d = 0; d < width; d += kPairPanel)
    for (int64_t i = 0; i < n; i += 2, out += 2 * kPairPanel) {
      const uint16_t* const low = rows + i * width + d;
      const VecU32 pairs = load_widened(low) | load_widened(low + width) << 16;
      __builtin_memcpy(out, &pairs, sizeof pairs);
    }
}

// B operand of X [n][width] -> A operand of X^T, [width][n].
inline void unpack_transposed(const uint16_t* pairs, int64_t n, int64_t width, uint16_t* out) {
  for (int64_t d = 0; d < width; d += kPairPanel, pairs += n * kPairPanel)
    for (int64_t i = 0; i < n; i += kPairSide)
      transpose_16(pairs_at(pairs + i * kPairPanel), kPairPanel, pairs_at(out + d * n + i), n / 2);
}

}  // namespace
}  // namespace capstan::ops::cpu
