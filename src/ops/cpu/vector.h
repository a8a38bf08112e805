// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as the instruction set of the including file, on GCC vector extensions.
// Everything here has internal linkage and uses no library templates: a function shared with other
// files would be compiled for this file's instruction set and might be the one that the linker
// keeps.
#pragma once
#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace capstan::ops::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define CAPSTAN_INLINE inline __attribute__((always_inline))

typedef float VecF32 __attribute__((vector_size(kVectorBytes)));
typedef double VecF64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

struct Bf16 {
  uint16_t bits;
};

// What a storage type is computed in.
template <class T>
struct Compute {
  using Scalar = float;
  using Vec = VecF32;
  using Int = VecI32;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vec = VecF64;
  using Int = VecI64;
};
template <class T>
using ScalarOf = typename Compute<T>::Scalar;
template <class T>
using VecOf = typename Compute<T>::Vec;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(ScalarOf<T>));

CAPSTAN_INLINE VecF32 splat(float x) { return x - VecF32{}; }
CAPSTAN_INLINE VecF64 splat(double x) { return x - VecF64{}; }

CAPSTAN_INLINE VecF32 load(const float* p) {
  VecF32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
CAPSTAN_INLINE VecF64 load(const double* p) {
  VecF64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
CAPSTAN_INLINE VecF32 load(const Bf16* p) {
  VecU16 half;
  __builtin_memcpy(&half, p, sizeof half);
  return reinterpret_cast<VecF32>(__builtin_convertvector(half, VecU32) << 16);
}

CAPSTAN_INLINE void store(float* p, VecF32 v) { __builtin_memcpy(p, &v, sizeof v); }
CAPSTAN_INLINE void store(double* p, VecF64 v) { __builtin_memcpy(p, &v, sizeof v); }
CAPSTAN_INLINE void store(Bf16* p, VecF32 v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  const VecU32 u = reinterpret_cast<VecU32>(v);
  const VecU32 rounded = u + 0x7fffU + ((u >> 16) & 1U);     // to nearest, ties to even
  const VecU32 bits = (v == v) ? rounded : (u | 0x400000U);  // a NaN stays one
  const VecU16 half = __builtin_convertvector(bits >> 16, VecU16);
#endif
  __builtin_memcpy(p, &half, sizeof half);
}

CAPSTAN_INLINE float to_scalar(float x) { return x; }
CAPSTAN_INLINE double to_scalar(double x) { return x; }
CAPSTAN_INLINE float to_scalar(Bf16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
CAPSTAN_INLINE void put(float* p, float x) { *p = x; }
CAPSTAN_INLINE void put(double* p, double x) { *p = x; }
CAPSTAN_INLINE void put(Bf16* p, float x) {
  Bf16 lanes[kLanes<Bf16>];
  store(lanes, splat(x));
  *p = lanes[0];
}

// The first `count` elements (all when count reaches the width); the other lanes are zero.
template <class T>
CAPSTAN_INLINE VecOf<T> load_part(const T* p, int64_t count) {
  if (count >= kLanes<T>) [[likely]]
    return load(p);
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(static_cast<const T*>(lanes));
}
template <class T>
CAPSTAN_INLINE void store_part(T* p, VecOf<T> v, int64_t count) {
  if (count >= kLanes<T>) [[likely]] {
    store(p, v);
    return;
  }
  T lanes[kLanes<T>];
  store(static_cast<T*>(lanes), v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
// What memory will hold after a store.
CAPSTAN_INLINE VecF32 rounded_to(const float*, VecF32 v) { return v; }
CAPSTAN_INLINE VecF64 rounded_to(const double*, VecF64 v) { return v; }
CAPSTAN_INLINE VecF32 rounded_to(const Bf16*, VecF32 v) {
  Bf16 lanes[kLanes<Bf16>];
  store(lanes, v);
  return load(lanes);
}

template <class V>
CAPSTAN_INLINE auto sum_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  auto sum = v[0];
  for (int i = 1; i < lanes; ++i) sum += v[i];
  return sum;
}
template <class V>
CAPSTAN_INLINE auto max_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  auto top = v[0];
  for (int i = 1; i < lanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// e^x by 2^n e^r, |r| <= ln2/2, and the Taylor series of e^r (degree 7: 5e-9; degree 12: 2e-16
// relative). Below the smallest normal number: 0. Above 2^127.5 (2^1023.5): infinity, out of the
// scale's exponent. NaN stays NaN. The magic constant rounds to the nearest integer.
CAPSTAN_INLINE VecF32 exp_of(VecF32 x) {
  const VecF32 low = splat(-87.0F), high = splat(88.72F);
  VecF32 y = x < low ? low : x;
  y = y > high ? high : y;
  const VecF32 magic = splat(12582912.0F);
  const VecF32 n = (y * 1.44269504088896341F + magic) - magic;
  const VecF32 r = (y - n * 0.693145751953125F) - n * 1.42860682030941723e-6F;
  VecF32 p = splat(1.0F / 5040);
  p = p * r + 1.0F / 720;
  p = p * r + 1.0F / 120;
  p = p * r + 1.0F / 24;
  p = p * r + 1.0F / 6;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const VecI32 scale = (__builtin_convertvector(n, VecI32) + 127) << 23;
  p *= reinterpret_cast<VecF32>(scale);
  return x < low ? VecF32{} : p;
}
CAPSTAN_INLINE VecF64 exp_of(VecF64 x) {
  const VecF64 low = splat(-708.0), high = splat(709.78);
  VecF64 y = x < low ? low : x;
  y = y > high ? high : y;
  const VecF64 magic = splat(6755399441055744.0);
  const VecF64 shifted = y * 1.4426950408889634074 + magic;
  const VecF64 n = shifted - magic;
  const VecF64 r = (y - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  VecF64 p = splat(1.0 / 479001600);
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // The low bits of the shifted number are n itself, in two's complement.
  const VecI64 scale = (reinterpret_cast<VecI64>(shifted) + 1023) << 52;
  p *= reinterpret_cast<VecF64>(scale);
  return x < low ? VecF64{} : p;
}

}  // namespace
}  // namespace capstan::ops::cpu
