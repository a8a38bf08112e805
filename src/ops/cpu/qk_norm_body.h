// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Body of the kernels of qk_norm_rope, compiled once per instruction set. T: type of x, W: of the
// weights.
#pragma once
#include "ops/cpu/qk_norm_kernels.h"
#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

// One head of one row.
template <class T, class W>
struct QkHead {
  using Scalar = ScalarOf<T>;
  const T* x;
  T* out;
  const W* weight;
  const Scalar *cos, *sin;
  Scalar* rstd;
  Scalar* partial;
};

template <class T, class W>
CAPSTAN_INLINE QkHead<T, W> qk_head(const QkNormArgs& a, int64_t row, int64_t head,
                                    ScalarOf<T>* partial) {
  using Scalar = ScalarOf<T>;
  const int64_t position = a.positions ? a.positions[row] : row % a.rows_per_sample;
  const int64_t at = row * a.row_stride + head * a.head_size, angle = position * a.head_size / 2;
  const bool is_q = head < a.q_heads;
  return {static_cast<const T*>(a.x) + at,
          static_cast<T*>(a.out) + at,
          static_cast<const W*>(is_q ? a.q_weight : a.k_weight),
          static_cast<const Scalar*>(a.cos) + angle,
          static_cast<const Scalar*>(a.sin) + angle,
          static_cast<Scalar*>(a.rstd) + row * (a.q_heads + a.k_heads) + head,
          partial && !is_q ? partial + a.head_size : partial};
}

template <class T, class W>
void qk_norm_forward(const QkNormArgs& args, int64_t row_begin, int64_t row_end) {
  using Scalar = ScalarOf<T>;
  const int64_t size = args.head_size, half = size / 2, heads = args.q_heads + args.k_heads;
  for (int64_t i = row_begin * heads; i < row_end * heads; ++i) {
    const QkHead<T, W> h = qk_head<T, W>(args, i / heads, i % heads, nullptr);
    VecOf<T> squares{};
    for (int64_t d = 0; d < size; d += kLanes<T>) {
      const VecOf<T> x = load_part(h.x + d, size - d);
      squares += x * x;
    }
    const Scalar mean = sum_lanes(squares) / static_cast<Scalar>(size);
    const Scalar rstd =
        Scalar(1) / static_cast<Scalar>(__builtin_sqrt(mean + static_cast<Scalar>(args.eps)));
    *h.rstd = rstd;
    for (int64_t d = 0; d < half; d += kLanes<T>) {
      const int64_t left = half - d;
      const VecOf<T> a = load_part(h.x + d, left) * rstd * load_part(h.weight + d, left);
      const VecOf<T> b =
          load_part(h.x + half + d, left) * rstd * load_part(h.weight + half + d, left);
      const VecOf<T> c = load_part(h.cos + d, left), s = load_part(h.sin + d, left);
      store_part(h.out + d, a * c - b * s, left);
      store_part(h.out + half + d, b * c + a * s, left);
    }
  }
}

template <class T, class W>
CAPSTAN_INLINE void qk_norm_backward_head(const QkNormArgs& args, const QkHead<T, W>& h) {
  using Scalar = ScalarOf<T>;
  const int64_t half = args.head_size / 2;
  const Scalar rstd = *h.rstd;
  VecOf<T> dot{};
  for (int64_t d = 0; d < half; d += kLanes<T>) {
    const int64_t left = half - d;
    const VecOf<T> a = load_part(h.out + d, left), b = load_part(h.out + half + d, left);
    const VecOf<T> c = load_part(h.cos + d, left), s = load_part(h.sin + d, left);
    const VecOf<T> low = (a * c + b * s) * load_part(h.x + d, left);
    const VecOf<T> high = (b * c - a * s) * load_part(h.x + half + d, left);
    dot += low * load_part(h.weight + d, left) + high * load_part(h.weight + half + d, left);
    if (!h.partial) continue;
    store_part(h.partial + d, load_part(h.partial + d, left) + low * rstd, left);
    store_part(h.partial + half + d, load_part(h.partial + half + d, left) + high * rstd, left);
  }
  const Scalar mean = sum_lanes(dot) * rstd * rstd * rstd / static_cast<Scalar>(args.head_size);
  for (int64_t d = 0; d < half; d += kLanes<T>) {
    const int64_t left = half - d;
    const VecOf<T> a = load_part(h.out + d, left), b = load_part(h.out + half + d, left);
    const VecOf<T> c = load_part(h.cos + d, left), s = load_part(h.sin + d, left);
    const VecOf<T> low = (a * c + b * s) * rstd * load_part(h.weight + d, left);
    const VecOf<T> high = (b * c - a * s) * rstd * load_part(h.weight + half + d, left);
    store_part(h.out + d, low - load_part(h.x + d, left) * mean, left);
    store_part(h.out + half + d, high - load_part(h.x + half + d, left) * mean, left);
  }
}

template <class T, class W>
void qk_norm_backward(const QkNormArgs& args, int64_t group_begin, int64_t group_end) {
  using Scalar = ScalarOf<T>;
  const int64_t heads = args.q_heads + args.k_heads, width = 2 * args.head_size;
  for (int64_t group = group_begin; group < group_end; ++group) {
    Scalar* const partial =
        args.partial ? static_cast<Scalar*>(args.partial) + group * width : nullptr;
    if (partial)
      for (int64_t d = 0; d < width; ++d) partial[d] = 0;
    const int64_t first = group * args.rows_per_group, end = first + args.rows_per_group;
    const int64_t last = end < args.rows ? end : args.rows;
    for (int64_t i = first * heads; i < last * heads; ++i)
      qk_norm_backward_head(args, qk_head<T, W>(args, i / heads, i % heads, partial));
  }
}

constexpr QkNormKernels kQkNormKernels = {
    {{qk_norm_forward<float, float>, qk_norm_forward<Bf16, Bf16>, qk_norm_forward<double, double>},
     {qk_norm_forward<float, float>, qk_norm_forward<Bf16, float>,
      qk_norm_forward<double, double>}},
    {{qk_norm_backward<float, float>, qk_norm_backward<Bf16, Bf16>,
      qk_norm_backward<double, double>},
     {qk_norm_backward<float, float>, qk_norm_backward<Bf16, float>,
      qk_norm_backward<double, double>}}};

}  // namespace
}  // namespace capstan::ops::cpu
