// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Included by one source per instruction set; loops that the compiler vectorises.
#pragma once
#include <bit>

#include "ops/cpu/fp8_kernels.h"

namespace capstan::ops::cpu {
namespace {

// A format with `mantissa` bits, numbers down to 2^smallest without subnormals.
struct Fp8Bits {
  int mantissa, smallest;
  uint32_t largest;  // pattern of the largest number
};
constexpr Fp8Bits kE4m3{3, -6, 0x7e}, kE5m2{2, -14, 0x7b};

inline float widened(float x) { return x; }
inline float widened(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

// Subnormals are rounded by the adder: a number whose last place is theirs is added and taken off.
template <Fp8Bits kBits>
inline uint8_t fp8_pattern(float x) {
  constexpr uint32_t kShift = 23 - kBits.mantissa;
  constexpr uint32_t kHalfLessOne = (1U << (kShift - 1)) - 1;
  constexpr uint32_t kBias = static_cast<uint32_t>(126 + kBits.smallest) << 23;
  constexpr uint32_t kLastPlace = static_cast<uint32_t>(150 + kBits.smallest - kBits.mantissa)
                                  << 23;
  constexpr uint32_t kNormalFrom = static_cast<uint32_t>(127 + kBits.smallest) << 23;
  constexpr uint32_t kSaturates = kBias + (kBits.largest << kShift), kInfinity = 0x7f800000U;
  const auto pattern = std::bit_cast<uint32_t>(x);
  const uint32_t size = pattern & 0x7fffffffU, sign = pattern >> 24 & 0x80U;
  const float sum = std::bit_cast<float>(size) + std::bit_cast<float>(kLastPlace);
  const uint32_t small = std::bit_cast<uint32_t>(sum) - kLastPlace;
  const uint32_t normal = (size - kBias + kHalfLessOne + (size >> kShift & 1U)) >> kShift;
  uint32_t result = size < kNormalFrom ? small : normal;
  result = size >= kSaturates ? kBits.largest : result;
  result = size > kInfinity ? 0x7fU : result | sign;
  return static_cast<uint8_t>(result);
}

template <class T, Fp8Bits kBits>
void cast(const void* x, uint8_t* out, int64_t count, float scale) {
  const T* const from = static_cast<const T*>(x);
  for (int64_t i = 0; i < count; ++i) out[i] = fp8_pattern<kBits>(widened(from[i]) * scale);
}

// Patterns of numbers without sign have the order of the numbers.
template <class T>
float largest(const void* x, int64_t count) {
  const T* const from = static_cast<const T*>(x);
  uint32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = std::bit_cast<uint32_t>(widened(from[i])) & 0x7fffffffU;
    const uint32_t number = size > 0x7f800000U ? 0 : size;
    top = number > top ? number : top;
  }
  return std::bit_cast<float>(top);
}

constexpr Fp8Kernels kFp8Kernels = {
    {largest<float>, largest<uint16_t>},
    {{cast<float, kE4m3>, cast<float, kE5m2>}, {cast<uint16_t, kE4m3>, cast<uint16_t, kE5m2>}}};

}  // namespace
}  // namespace capstan::ops::cpu
