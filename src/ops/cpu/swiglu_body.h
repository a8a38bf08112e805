// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Body of the SwiGLU kernels, compiled once per instruction set.
#pragma once
#include "ops/cpu/swiglu_kernels.h"
#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

template <class V>
CAPSTAN_INLINE V sigmoid_of(V x) {
  return 1 / (1 + exp_of(-x));
}

template <class T>
void swiglu_forward(const SwigluArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t n = a.features;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* const gate = static_cast<const T*>(a.gate_up) + row * 2 * n;
    T* const out = static_cast<T*>(a.out) + row * n;
    for (int64_t f = 0; f < n; f += kLanes<T>) {
      const VecOf<T> g = load_part(gate + f, n - f);
      store_part(out + f, g * sigmoid_of(g) * load_part(gate + n + f, n - f), n - f);
    }
  }
}

template <class T>
void swiglu_backward(const SwigluArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t n = a.features;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* const gate = static_cast<const T*>(a.gate_up) + row * 2 * n;
    const T* const grad = static_cast<const T*>(a.grad) + row * n;
    T* const out = static_cast<T*>(a.out) + row * 2 * n;
    for (int64_t f = 0; f < n; f += kLanes<T>) {
      const VecOf<T> g = load_part(gate + f, n - f), u = load_part(gate + n + f, n - f);
      const VecOf<T> d = load_part(grad + f, n - f), s = sigmoid_of(g);
      store_part(out + f, d * u * s * (1 + g * (1 - s)), n - f);
      store_part(out + n + f, d * g * s, n - f);
    }
  }
}

constexpr SwigluKernels kSwigluKernels = {
    {swiglu_forward<float>, swiglu_forward<Bf16>, swiglu_forward<double>},
    {swiglu_backward<float>, swiglu_backward<Bf16>, swiglu_backward<double>}};

}  // namespace
}  // namespace capstan::ops::cpu
