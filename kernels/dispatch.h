// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// From a dtype at run time to a type: visit(Tag<T>{}).
#pragma once
#include <type_traits>

#include "capstan/base/dtype.h"
#include "check.h"
#include "numbers.cuh"

namespace capstan::kernels {

template <class T>
struct Tag {
  using Type = T;
};
template <class T>
using TypeOf = typename std::remove_reference_t<T>::Type;

template <class Visit>
void with_float(const char* kernel, DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFp32:
      return visit(Tag<float>{});
    case DType::kBf16:
      return visit(Tag<Bf16>{});
    case DType::kFp64:
      return visit(Tag<double>{});
    default:
      throw_bad_dtype(kernel, {dtype});
  }
}

}  // namespace capstan::kernels
