// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/dtype.h"

#include <array>

#include "capstan/base/check.h"

namespace capstan {

namespace {

struct Entry {
  DType dtype;
  size_t size;
  std::string_view name, safetensors;
};

constexpr std::array<Entry, 11> kTable = {{
    {DType::kFp64, 8, "fp64", "F64"},
    {DType::kFp32, 4, "fp32", "F32"},
    {DType::kBf16, 2, "bf16", "BF16"},
    {DType::kFp16, 2, "fp16", "F16"},
    {DType::kInt64, 8, "int64", "I64"},
    {DType::kInt32, 4, "int32", "I32"},
    {DType::kInt16, 2, "int16", "I16"},
    {DType::kInt8, 1, "int8", "I8"},
    {DType::kUint8, 1, "uint8", "U8"},
    {DType::kUint16, 2, "uint16", "U16"},
    {DType::kBool, 1, "bool", "BOOL"},
}};

const Entry& entry_of(DType dtype) {
  for (const Entry& entry : kTable) {
    if (entry.dtype == dtype) return entry;
  }
  CAPSTAN_CHECK(false, "no such dtype: {}", static_cast<int>(dtype));
  return kTable[0];
}

}  // namespace

size_t size_of(DType dtype) { return entry_of(dtype).size; }
std::string_view name_of(DType dtype) { return entry_of(dtype).name; }
std::string_view safetensors_name_of(DType dtype) { return entry_of(dtype).safetensors; }

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const Entry& entry : kTable) {
    if (entry.name == name) return entry.dtype;
  }
  return std::nullopt;
}

std::optional<DType> dtype_from_safetensors(std::string_view name) {
  for (const Entry& entry : kTable) {
    if (entry.safetensors == name) return entry.dtype;
  }
  return std::nullopt;
}

}  // namespace capstan
