// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Checks of launcher arguments; what fails is a bug of the caller and throws InternalError. No fmt
// here: nvcc cannot evaluate its format strings.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "capstan/base/dtype.h"
#include "config.h"

namespace capstan::kernels {

struct NamedPointer {
  const char* name;
  const void* pointer;
};
// Each "{}" of the text stands for the next number.
void require(bool is_met, const char* kernel, const char* text,
             std::initializer_list<int64_t> numbers = {});
// Names the first null pointer.
void check_present(const char* kernel, std::initializer_list<NamedPointer> pointers);
// Whether all of them (null counts) can be read by 16 bytes at a time.
[[nodiscard]] bool are_aligned(std::initializer_list<const void*> pointers);
[[noreturn]] void throw_bad_dtype(const char* kernel, std::initializer_list<DType> dtypes);
void check_sizes(const char* kernel, std::initializer_list<int64_t> sizes);

}  // namespace capstan::kernels
