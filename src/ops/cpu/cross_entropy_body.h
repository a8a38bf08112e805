// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Body of the cross-entropy kernels, compiled once per instruction set.
#pragma once
#include "ops/cpu/cross_entropy_kernels.h"
#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

template <class T>
struct RowStats {
  ScalarOf<T> top, sum;
};

template <class T>
CAPSTAN_INLINE RowStats<T> row_stats(const T* row, int64_t columns) {
  using Scalar = ScalarOf<T>;
  const Scalar lowest = -static_cast<Scalar>(__builtin_inf());
  const int64_t whole = columns - columns % kLanes<T>;
  VecOf<T> top_v = splat(lowest);
  for (int64_t v = 0; v < whole; v += kLanes<T>) {
    const VecOf<T> x = load(row + v);
    top_v = x > top_v ? x : top_v;
  }
  Scalar top = max_lanes(top_v);
  for (int64_t v = whole; v < columns; ++v) {
    const Scalar x = to_scalar(row[v]);
    top = x > top ? x : top;
  }
  VecOf<T> sum_v{};
  for (int64_t v = 0; v < whole; v += kLanes<T>) sum_v += exp_of(load(row + v) - top);
  Scalar sum = sum_lanes(sum_v);
  if (whole < columns) {
    const VecOf<T> tail = exp_of(load_part(row + whole, columns - whole) - top);
    for (int64_t v = whole; v < columns; ++v) sum += tail[v - whole];
  }
  return {top, sum};
}

// row -> scale * exp(row - shift) - at the target: w.
template <class T>
CAPSTAN_INLINE void row_gradient(T* row, int64_t columns, int64_t target, ScalarOf<T> shift,
                                 ScalarOf<T> scale, ScalarOf<T> weight) {
  const bool here = target >= 0 && target < columns;
  const auto picked = here ? to_scalar(row[target]) : ScalarOf<T>(0);
  for (int64_t v = 0; v < columns; v += kLanes<T>)
    store_part(row + v, exp_of(load_part(row + v, columns - v) - shift) * scale, columns - v);
  if (here) {
    const VecOf<T> p = exp_of(splat(picked) - shift) * scale;
    put(row + target, p[0] - weight);
  }
}

template <class T>
CAPSTAN_INLINE void zero_row(T* row, int64_t columns) {
  for (int64_t v = 0; v < columns; v += kLanes<T>) store_part(row + v, VecOf<T>{}, columns - v);
}

template <class T>
void cross_entropy_stats(const CrossEntropyArgs& a, int64_t row_begin, int64_t row_end) {
  using Scalar = ScalarOf<T>;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* const row = static_cast<const T*>(a.logits) + r * a.row_stride;
    const RowStats<T> stats = row_stats(row, a.columns);
    static_cast<Scalar*>(a.top)[r] = stats.top;
    static_cast<Scalar*>(a.sum)[r] = stats.sum;
    const int64_t target = a.targets[r] - a.first_column;
    const bool here = a.targets[r] >= 0 && target >= 0 && target < a.columns;
    static_cast<Scalar*>(a.picked)[r] = here ? to_scalar(row[target]) : Scalar(0);
  }
}

template <class T>
void cross_entropy_gradient(const CrossEntropyArgs& a, int64_t row_begin, int64_t row_end) {
  using Scalar = ScalarOf<T>;
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* const row = static_cast<T*>(a.logits) + r * a.row_stride;
    if (a.targets[r] == kIgnored) {
      zero_row(row, a.columns);
      continue;
    }
    const Scalar weight = static_cast<const Scalar*>(a.weights)[r];
    row_gradient(row, a.columns, a.targets[r] - a.first_column,
                 static_cast<const Scalar*>(a.lse)[r], weight, weight);
  }
}

template <class T>
void cross_entropy_fused(const CrossEntropyArgs& a, int64_t row_begin, int64_t row_end) {
  using Scalar = ScalarOf<T>;
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* const row = static_cast<T*>(a.logits) + r * a.row_stride;
    const int64_t target = a.targets[r];
    if (target == kIgnored) {
      static_cast<Scalar*>(a.logprob)[r] = 0;
      if (a.weights) zero_row(row, a.columns);
      continue;
    }
    const RowStats<T> stats = row_stats(row, a.columns);
    static_cast<Scalar*>(a.logprob)[r] =
        to_scalar(row[target]) - stats.top - static_cast<Scalar>(__builtin_log(stats.sum));
    if (!a.weights) continue;
    const Scalar weight = static_cast<const Scalar*>(a.weights)[r];
    row_gradient(row, a.columns, target, stats.top, weight / stats.sum, weight);
  }
}

constexpr CrossEntropyKernels kCrossEntropyKernels = {
    {cross_entropy_stats<float>, cross_entropy_stats<Bf16>, cross_entropy_stats<double>},
    {cross_entropy_gradient<float>, cross_entropy_gradient<Bf16>, cross_entropy_gradient<double>},
    {cross_entropy_fused<float>, cross_entropy_fused<Bf16>, cross_entropy_fused<double>}};

}  // namespace
}  // namespace capstan::ops::cpu
