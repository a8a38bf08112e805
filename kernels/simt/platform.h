// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that the kernels use, for the host compiler: a grid runs block after block, the
// threads of a block as fibers (simt.h). Twin of kernels/cuda/platform.h.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "../config.h"
#include "capstan/kernels/stream.h"
#include "number_bits.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define CAPSTAN_UNROLL

struct SimtIndex {
  unsigned x = 0, y = 0, z = 0;
};
// Of the fiber that runs; the scheduler sets them.
inline SimtIndex threadIdx, blockIdx, blockDim, gridDim;

namespace capstan::kernels::simt {

template <class T>
T exchange(T value, uint32_t mask, int source_lane, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = exchange_words(mask, word, line)[source_lane];
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace capstan::kernels::simt

inline void __syncthreads(int line = __builtin_LINE()) { capstan::kernels::simt::sync_block(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  capstan::kernels::simt::exchange_words(mask, 0, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return capstan::kernels::simt::exchange(value, mask, capstan::kernels::simt::lane() ^ lanes,
                                          line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return capstan::kernels::simt::exchange(value, mask, lane & 31, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const int lane = capstan::kernels::simt::lane(), source = lane - static_cast<int>(delta);
  return capstan::kernels::simt::exchange(value, mask, source < 0 ? lane : source, line);
}
inline unsigned __ballot_sync(unsigned mask, int is_set, int line = __builtin_LINE()) {
  const uint64_t* words = capstan::kernels::simt::exchange_words(mask, is_set != 0 ? 1 : 0, line);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(words[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int is_set, int line = __builtin_LINE()) {
  return __ballot_sync(mask, is_set, line) != 0;
}
inline int __all_sync(unsigned mask, int is_set, int line = __builtin_LINE()) {
  return __ballot_sync(mask, is_set, line) == 0xffffffffu;
}

// Fibers change only at barriers, so plain reads and writes are atomic. Integers only: sums of
// floating-point numbers would depend on the order.
inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }
inline int atomicMax(int* at, int value) { return std::exchange(*at, value > *at ? value : *at); }
inline int atomicOr(int* at, int value) { return std::exchange(*at, *at | value); }
inline int atomicExch(int* at, int value) { return std::exchange(*at, value); }

namespace capstan::kernels {

inline float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of_float(float x) { return std::bit_cast<uint32_t>(x); }
inline double double_of_bits(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint64_t bits_of_double(double x) { return std::bit_cast<uint64_t>(x); }

inline void require_aligned(const void* at, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0)
    simt::fail_thread("a vector access that is not aligned");
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(simt::dynamic_shared());
}

template <class... Parameters, class... Arguments>
void launch(const char* name, const LaunchShape& shape, Stream, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  simt::run_grid(name, shape, [&] { kernel(arguments...); });
}

}  // namespace capstan::kernels
