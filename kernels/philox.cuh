// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 and the normal distribution on the device, with the bits of capstan/base/philox.h.
// Files that include this are compiled without contraction of products and sums (CMakeLists.txt).
#pragma once
#include "numbers.cuh"

namespace capstan::kernels {

struct PhiloxBits {
  uint32_t word[4];
};

__device__ __forceinline__ PhiloxBits philox(uint64_t seed, uint64_t stream, uint64_t index) {
  auto c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  auto c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  CAPSTAN_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Rounds up with the probability of the part cut off; `random` has 16 bits. Infinities and NaN
// stay.
__device__ __forceinline__ Bf16 round_stochastically(float x, uint32_t random) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return Bf16{bf16_bits(x)};
  return Bf16{static_cast<uint16_t>((bits + (random & 0xffffu)) >> 16)};
}

}  // namespace capstan::kernels
