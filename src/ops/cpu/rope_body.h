// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Body of the RoPE kernel, compiled once per instruction set.
#pragma once
#include "ops/cpu/rope_kernels.h"
#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

template <class T>
void rope_rotate(const RopeArgs& args, int64_t row_begin, int64_t row_end) {
  using Scalar = ScalarOf<T>;
  const int64_t half = args.head_size / 2;
  const Scalar direction = args.backward ? Scalar(-1) : Scalar(1);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t position = args.positions ? args.positions[row] : row % args.rows_per_sample;
    const Scalar* const cos = static_cast<const Scalar*>(args.cos) + position * half;
    const Scalar* const sin = static_cast<const Scalar*>(args.sin) + position * half;
    for (int64_t head = 0; head < args.heads; ++head) {
      T* const first = static_cast<T*>(args.x) + row * args.row_stride + head * args.head_size;
      T* const second = first + half;
      for (int64_t d = 0; d < half; d += kLanes<T>) {
        const int64_t left = half - d;
        const VecOf<T> a = load_part(first + d, left), b = load_part(second + d, left);
        const VecOf<T> c = load_part(cos + d, left), s = load_part(sin + d, left) * direction;
        store_part(first + d, a * c - b * s, left);
        store_part(second + d, b * c + a * s, left);
      }
    }
  }
}

constexpr RopeKernels kRopeKernels = {{rope_rotate<float>, rope_rotate<Bf16>, rope_rotate<double>}};

}  // namespace
}  // namespace capstan::ops::cpu
