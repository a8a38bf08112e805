// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The dynamic 8-bit code of optimizer states (Dettmers, "8-Bit Approximations for Parallelism in
// Deep Learning", 2016; Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022):
// numbers in (0, 1] by decade, from 10^-6 up, each decade with twice as many steps as the one
// below, beside 0 and 1. Signed for first moments: 127 negative numbers, 0, 128 positive ones.
// Unsigned for second moments: 0 and 255 positive ones.
//
// A block keeps s = the largest |x| in it; x is stored as the byte of the code's number nearest to
// x / s (the lower one of two equally near) and read as number[byte] * s. Byte 0 is the number 0 in
// both codes, so that zeroed memory is zero. A second moment that is not 0 takes at least the
// smallest number: as 0 it would leave the root to epsilon, and the next step without bound.
#pragma once
#include <cstdint>

namespace capstan::kernels {

struct DynamicCode {
  float number[256] = {};  // by byte
  float middle[256] = {};  // between neighbours in ascending order; 255 of them
  int32_t zero = 0;        // place of 0 in ascending order; byte = place - zero, modulo 256
};
// What kernels read, in their memory.
struct MomentCodes {
  DynamicCode first, second;
};

namespace dynamic_code {

// Middles of the decade's equal parts, times its power of ten: of decade 0 to 6.
constexpr double number(int decade, int part, int parts) {
  double power = 1;
  for (int i = decade; i < 6; ++i) power *= 10;
  return (0.1 + 0.9 * (part + 0.5) / parts) / power;
}

constexpr DynamicCode make(bool is_signed) {
  double ascending[256] = {};
  int count = 0;
  if (is_signed)
    for (int decade = 6; decade >= 0; --decade)
      for (int part = (1 << decade) - 1; part >= 0; --part)
        ascending[count++] = -number(decade, part, 1 << decade);
  DynamicCode code;
  code.zero = count;
  ascending[count++] = 0;
  for (int decade = 0; decade <= 6; ++decade) {
    const int parts = is_signed ? 1 << decade : 2 << decade;
    for (int part = 0; part < parts; ++part) ascending[count++] = number(decade, part, parts);
  }
  ascending[count++] = 1;
  for (int i = 0; i < 256; ++i) {
    code.number[static_cast<uint8_t>(i - code.zero)] = static_cast<float>(ascending[i]);
    if (i < 255) code.middle[i] = static_cast<float>((ascending[i] + ascending[i + 1]) / 2);
  }
  return code;
}

}  // namespace dynamic_code

inline constexpr MomentCodes kMomentCodes{dynamic_code::make(true), dynamic_code::make(false)};

}  // namespace capstan::kernels
