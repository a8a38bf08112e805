// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Element types by their name in recipes (fp32) and in safetensors files (F32).
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace capstan {

enum class DType {
  kFp64,
  kFp32,
  kBf16,
  kFp16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUint8,
  kUint16,
  kBool
};

[[nodiscard]] size_t size_of(DType dtype);                                  // bytes per element
[[nodiscard]] std::string_view name_of(DType dtype);                        // "fp32", "int64", ...
[[nodiscard]] std::string_view safetensors_name_of(DType dtype);            // "F32", "I64", ...
[[nodiscard]] std::optional<DType> dtype_from_name(std::string_view name);  // recipe spelling
[[nodiscard]] std::optional<DType> dtype_from_safetensors(std::string_view name);

}  // namespace capstan
