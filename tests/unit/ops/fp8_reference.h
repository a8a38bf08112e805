// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// fp8 by the book: numbers are decoded from their bits, rounding looks at all of them, products are
// fp64. Shares nothing with the code under test.
#pragma once
#include <ATen/ATen.h>

#include <array>
#include <cmath>

#include "capstan/ops/fp8.h"

namespace capstan::testing {

using ops::Fp8Format;

struct BookFormat {
  int mantissa, bias;
  double largest;
};
inline BookFormat book_format(Fp8Format format) {
  return format == Fp8Format::kE4m3 ? BookFormat{3, 7, 448} : BookFormat{2, 15, 57344};
}

// Of a pattern without sign; those beyond the largest number have no use here.
inline double decode(int bits, const BookFormat& f) {
  const int exponent = bits >> f.mantissa, m = bits & ((1 << f.mantissa) - 1);
  return exponent == 0 ? std::ldexp(m, 1 - f.bias - f.mantissa)
                       : std::ldexp((1 << f.mantissa) + m, exponent - f.bias - f.mantissa);
}

// The pattern of the nearest number; of two the even one.
inline uint8_t nearest(double x, Fp8Format format) {
  const BookFormat f = book_format(format);
  if (std::isnan(x)) return 0x7f;
  const double size = std::fmin(std::fabs(x), f.largest);
  int best = 0;
  for (int bits = 1; bits < 0x7f && decode(bits, f) <= f.largest; ++bits) {
    const double now = std::fabs(decode(bits, f) - size),
                 before = std::fabs(decode(best, f) - size);
    if (now < before || (now == before && bits % 2 == 0)) best = bits;
  }
  return static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}

inline double value_of(uint8_t bits, Fp8Format format) {
  const double size = decode(bits & 0x7f, book_format(format));
  return (bits & 0x80) != 0 ? -size : size;
}

// What x [M, K] is after the way through fp8, in fp64; one scale for `largest` > 0, or one per row.
inline at::Tensor through_fp8(const at::Tensor& x_MK, Fp8Format format, double largest) {
  const at::Tensor in = x_MK.to(at::kFloat).contiguous();
  const at::Tensor out = at::empty(in.sizes(), at::kDouble);
  for (int64_t r = 0; r < in.size(0); ++r) {
    const double top = largest > 0 ? largest : in[r].abs().max().item<double>();
    const float scale =
        top > 0 ? static_cast<float>(book_format(format).largest) / static_cast<float>(top) : 1.0F;
    for (int64_t c = 0; c < in.size(1); ++c)
      out[r][c] = value_of(nearest(in[r][c].item<float>() * scale, format), format) *
                  static_cast<double>(1 / scale);
  }
  return out;
}

}  // namespace capstan::testing
