// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include <string>

#include "capstan/base/check.h"
#include "capstan/base/error.h"

namespace capstan::kernels {

void require(bool is_met, const char* kernel, const char* text,
             std::initializer_list<int64_t> numbers) {
  if (is_met) return;
  std::string got = text;
  for (const int64_t number : numbers)
    if (const auto at = got.find("{}"); at != std::string::npos)
      got.replace(at, 2, std::to_string(number));
  throw InternalError(ErrorText{.module = "kernels",
                                .what = std::string("launching ") + kernel,
                                .got = got,
                                .need = {},
                                .why = {},
                                .fix = {}});
}

void check_present(const char* kernel, std::initializer_list<NamedPointer> pointers) {
  for (const auto& p : pointers)
    CAPSTAN_CHECK(p.pointer != nullptr, "{}: {} is null", kernel, p.name);
}

bool are_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % kVectorBytes != 0) return false;
  return true;
}

void throw_bad_dtype(const char* kernel, std::initializer_list<DType> dtypes) {
  std::string names;
  for (const DType dtype : dtypes)
    names += (names.empty() ? "" : ", ") + std::string(name_of(dtype));
  throw InternalError(ErrorText{.module = "kernels",
                                .what = std::string("launching ") + kernel,
                                .got = names,
                                .need = "dtypes that the kernel has",
                                .why = {},
                                .fix = {}});
}

void check_sizes(const char* kernel, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) CAPSTAN_CHECK(size >= 0, "{}: a size of {}", kernel, size);
}

}  // namespace capstan::kernels
