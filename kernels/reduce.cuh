// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Sums and maxima over warps and over groups of whole warps, in an order that only the shape of the
// group decides. All threads of a block must call them together.
#pragma once
#include "numbers.cuh"

namespace capstan::kernels {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

template <class Op, class T>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  CAPSTAN_UNROLL
  for (int step = 16; step > 0; step /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Over `warps` consecutive warps that start at warp `first` of the block; every thread gets the
// result. `part` holds a value per warp of the block and is free again after the second barrier.
template <class Op, class T>
__device__ __forceinline__ T group_reduce(T value, Op op, T* part, int first, int warps) {
  value = warp_reduce(value, op);
  if (warps == 1) return value;
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  __syncthreads();
  T all = part[first];
  for (int warp = 1; warp < warps; ++warp) all = op(all, part[first + warp]);
  __syncthreads();
  return all;
}

template <class Op, class T>
__device__ __forceinline__ T block_reduce(T value, Op op, T* part) {
  return group_reduce(value, op, part, 0, static_cast<int>(blockDim.x / 32));
}

}  // namespace capstan::kernels
