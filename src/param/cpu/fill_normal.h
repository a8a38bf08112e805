// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// philox::fill_normal, many elements at a time: the same operations in the same order on every
// element, never contracted (-ffp-contract=off), so all variants give its bits. Writes 4 or 8 bytes
// per element; bound by arithmetic.
#pragma once
#include <cstddef>
#include <cstdint>

namespace capstan::param::cpu {

struct NormalStream {
  uint64_t seed, stream, first;  // `first`: index of out[0]
  double deviation;
};

struct FillNormal {
  void (*f32)(float* out, size_t count, const NormalStream& from);
  void (*f64)(double* out, size_t count, const NormalStream& from);
};

namespace plain {
extern const FillNormal kFillNormal;
}
namespace avx2 {
extern const FillNormal kFillNormal;
}
namespace avx512 {
extern const FillNormal kFillNormal;
}

[[nodiscard]] const FillNormal& fill_normal();  // of device::isa_level()

}  // namespace capstan::param::cpu
