// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Element types of the CPU kernels, and how work is divided. fp16 has no kernels: its ops take the
// reference form.
#pragma once
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace capstan::ops::cpu {

enum class Element { kF32, kBf16, kF64 };
inline constexpr int kElements = 3;
// (residual, compute) combinations.
enum class Pair { kF32F32, kF32Bf16, kBf16Bf16, kF64F64 };
inline constexpr int kPairs = 4;

[[nodiscard]] inline std::optional<Element> element_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::ScalarType::Float:
      return Element::kF32;
    case at::ScalarType::BFloat16:
      return Element::kBf16;
    case at::ScalarType::Double:
      return Element::kF64;
    default:
      return std::nullopt;
  }
}

[[nodiscard]] inline std::optional<Pair> dtype_pair(at::ScalarType residual,
                                                    at::ScalarType compute) {
  const auto r = element_of(residual), c = element_of(compute);
  if (!r || !c) return std::nullopt;
  if (*r == Element::kF32 && *c == Element::kF32) return Pair::kF32F32;
  if (*r == Element::kF32 && *c == Element::kBf16) return Pair::kF32Bf16;
  if (*r == Element::kBf16 && *c == Element::kBf16) return Pair::kBf16Bf16;
  if (*r == Element::kF64 && *c == Element::kF64) return Pair::kF64F64;
  return std::nullopt;
}

// Rows per task so that a task is worth starting.
[[nodiscard]] inline int64_t grain(int64_t width) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
}

}  // namespace capstan::ops::cpu
