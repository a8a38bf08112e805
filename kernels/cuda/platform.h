// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What kernels need of CUDA. kernels/simt/platform.h is its twin for the host; a target picks one
// by its include path.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../config.h"
#include "capstan/kernels/stream.h"

#define CAPSTAN_UNROLL _Pragma("unroll")

namespace capstan::kernels {

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }
__device__ __forceinline__ double double_of_bits(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
__device__ __forceinline__ uint64_t bits_of_double(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x));
}
__device__ __forceinline__ uint16_t bf16_bits(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
// Of numbers, not of NaN; what is too large becomes the largest number.
__device__ __forceinline__ uint8_t e4m3_bits(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint8_t e5m2_bits(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
}

// The hardware stops the kernel by itself.
__device__ __forceinline__ void require_aligned(const void*, size_t) {}

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char capstan_shared[];
  return reinterpret_cast<T*>(capstan_shared);
}

// Throws EnvError when the last launch was refused.
void check_launch(const char* kernel);

template <class... Parameters, class... Arguments>
void launch(const char* name, const LaunchShape& shape, Stream stream,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.threads),
           static_cast<size_t>(shape.shared_bytes), stream>>>(arguments...);
  check_launch(name);
}

}  // namespace capstan::kernels
