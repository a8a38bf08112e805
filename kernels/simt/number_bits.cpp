// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "number_bits.h"

#include <bit>
#include <cmath>

namespace capstan::kernels {
namespace {

// Format with a sign, `mantissa` bits and exponents from `lowest` (that of the smallest normal
// number); `largest` is the pattern of the largest number.
uint8_t round_to_byte(float x, int mantissa, int lowest, uint8_t largest) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const double size = std::fabs(static_cast<double>(x));
  if (size == 0) return sign;
  if (!std::isfinite(size)) return sign | largest;
  int exponent = std::ilogb(size);
  if (exponent < lowest) exponent = lowest;
  // Units in the last place; halves go to even in the default rounding mode.
  const double units = std::nearbyint(std::ldexp(size, mantissa - exponent));
  // A normal number carries the hidden bit in `units`, which makes its exponent field one more.
  const auto pattern = static_cast<int64_t>(std::ldexp(exponent - lowest, mantissa) + units);
  return sign | static_cast<uint8_t>(pattern > largest ? largest : pattern);
}

}  // namespace

uint16_t bf16_bits(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint8_t e4m3_bits(float x) { return round_to_byte(x, 3, -6, 0x7e); }
uint8_t e5m2_bits(float x) { return round_to_byte(x, 2, -14, 0x7b); }

}  // namespace capstan::kernels
