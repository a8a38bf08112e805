// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Element types on the device, and vectors of them.
#pragma once
#include <cstdint>

#include "platform.h"

namespace capstan::kernels {

struct Bf16 {
  uint16_t bits;
};

// The type that sums and statistics use.
template <class T>
struct WideOf {
  using Type = float;
};
template <>
struct WideOf<double> {
  using Type = double;
};
template <class T>
using Wide = typename WideOf<T>::Type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) {
  return float_of_bits(static_cast<uint32_t>(x.bits) << 16);
}

// Rounds to nearest even.
template <class T, class W>
__device__ __forceinline__ T narrow(W x) {
  if constexpr (sizeof(T) == 2)
    return Bf16{bf16_bits(static_cast<float>(x))};
  else
    return static_cast<T>(x);
}

// N elements, loaded and stored as 16-byte words where they fill them.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T at[N];
};
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* from) {
  require_aligned(from, alignof(Vec<T, N>));
  return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& value) {
  require_aligned(to, alignof(Vec<T, N>));
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

// How many elements fill a 16-byte load of the narrower of two types.
template <class A, class B = A>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float root_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double root_of(double x) { return sqrt(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float erf_of(float x) { return erff(x); }
__device__ __forceinline__ double erf_of(double x) { return erf(x); }
template <class W>
__device__ __forceinline__ W sigmoid_of(W x) {
  return W(1) / (W(1) + exp_of(-x));
}

__device__ __forceinline__ int64_t first_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t all_threads() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace capstan::kernels
