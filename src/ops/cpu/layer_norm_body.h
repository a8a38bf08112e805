// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Body of the LayerNorm kernels, compiled once per instruction set. R: residual type, C: compute
// type, W: type of weight and bias.
#pragma once
#include "ops/cpu/layer_norm_kernels.h"
#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

// Lanes from `count` on become zero.
template <class T>
CAPSTAN_INLINE VecOf<T> first_lanes(VecOf<T> v, int64_t count) {
  if (count >= kLanes<T>) [[likely]]
    return v;
  VecOf<T> first{};
  for (int64_t i = 0; i < count; ++i) first[i] = v[i];
  return first;
}

// s of a row, stored where there is a hidden; returns its mean.
template <class R, class C>
CAPSTAN_INLINE ScalarOf<R> add_row(const R* residual, const C* hidden, R* sum, int64_t width) {
  VecOf<R> total{};
  for (int64_t d = 0; d < width; d += kLanes<R>) {
    VecOf<R> x = load_part(residual + d, width - d);
    if (hidden) {
      x = rounded_to(sum, x + load_part(hidden + d, width - d));
      store_part(sum + d, x, width - d);
    }
    total += x;
  }
  return sum_lanes(total) / static_cast<ScalarOf<R>>(width);
}

template <class R, class C, class W>
void layer_norm_forward(const LayerNormForwardArgs& a, int64_t row_begin, int64_t row_end) {
  using Scalar = ScalarOf<R>;
  constexpr int kStep = kLanes<R>;
  const W* const weight = static_cast<const W*>(a.weight);
  const W* const bias = static_cast<const W*>(a.bias);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t at = row * a.width;
    R* const sum = static_cast<R*>(a.sum) + at;
    C* const normed = static_cast<C*>(a.normed) + at;
    const Scalar mean =
        add_row<R, C>(static_cast<const R*>(a.residual) + at,
                      a.hidden ? static_cast<const C*>(a.hidden) + at : nullptr, sum, a.width);
    VecOf<R> squares{};
    for (int64_t d = 0; d < a.width; d += kStep) {
      const VecOf<R> x = first_lanes<R>(load_part(sum + d, a.width - d) - mean, a.width - d);
      squares += x * x;
    }
    const Scalar variance = sum_lanes(squares) / static_cast<Scalar>(a.width);
    const Scalar rstd =
        Scalar(1) / static_cast<Scalar>(__builtin_sqrt(variance + static_cast<Scalar>(a.eps)));
    static_cast<Scalar*>(a.mean)[row] = mean;
    static_cast<Scalar*>(a.rstd)[row] = rstd;
    for (int64_t d = 0; d < a.width; d += kStep) {
      const int64_t left = a.width - d;
      const VecOf<R> h = (load_part(sum + d, left) - mean) * rstd;
      store_part(normed + d, h * load_part(weight + d, left) + load_part(bias + d, left), left);
    }
  }
}

template <class R, class C, class W>
CAPSTAN_INLINE void layer_norm_backward_row(const LayerNormBackwardArgs& a, int64_t row,
                                            ScalarOf<R>* partial) {
  using Scalar = ScalarOf<R>;
  constexpr int kStep = kLanes<R>;
  const int64_t at = row * a.width;
  const R* const x = static_cast<const R*>(a.x) + at;
  const C* const grad = static_cast<const C*>(a.grad) + at;
  const W* const weight = static_cast<const W*>(a.weight);
  R* const dx = static_cast<R*>(a.dx) + at;
  C* const d_hidden = a.d_hidden ? static_cast<C*>(a.d_hidden) + at : nullptr;
  const Scalar mean = static_cast<const Scalar*>(a.mean)[row];
  const Scalar rstd = static_cast<const Scalar*>(a.rstd)[row];
  VecOf<R> total{}, dot{};
  for (int64_t d = 0; d < a.width; d += kStep) {
    const int64_t left = a.width - d;
    const VecOf<R> dy = load_part(grad + d, left), h = (load_part(x + d, left) - mean) * rstd;
    const VecOf<R> g = dy * load_part(weight + d, left);  // zero past the width
    total += g;
    dot += g * h;
    if (!partial) continue;
    Scalar *const dw = partial + d, *const db = partial + a.width + d;
    store_part(dw, load_part(dw, left) + dy * h, left);
    store_part(db, load_part(db, left) + dy, left);
  }
  const Scalar mean_g = sum_lanes(total) / static_cast<Scalar>(a.width);
  const Scalar mean_gh = sum_lanes(dot) / static_cast<Scalar>(a.width);
  for (int64_t d = 0; d < a.width; d += kStep) {
    const int64_t left = a.width - d;
    const VecOf<R> h = (load_part(x + d, left) - mean) * rstd;
    const VecOf<R> g = load_part(grad + d, left) * load_part(weight + d, left);
    VecOf<R> v = (g - mean_g - h * mean_gh) * rstd;
    if (a.add_to_dx) v += load_part(dx + d, left);
    store_part(dx + d, v, left);
    if (d_hidden) store_part(d_hidden + d, v, left);
  }
}

template <class R, class C, class W>
void layer_norm_backward(const LayerNormBackwardArgs& a, int64_t group_begin, int64_t group_end) {
  using Scalar = ScalarOf<R>;
  for (int64_t group = group_begin; group < group_end; ++group) {
    Scalar* const partial =
        a.partial ? static_cast<Scalar*>(a.partial) + group * 2 * a.width : nullptr;
    if (partial)
      for (int64_t d = 0; d < 2 * a.width; ++d) partial[d] = 0;
    const int64_t first = group * a.rows_per_group;
    const int64_t last = first + a.rows_per_group < a.rows ? first + a.rows_per_group : a.rows;
    for (int64_t row = first; row < last; ++row) layer_norm_backward_row<R, C, W>(a, row, partial);
  }
}

constexpr LayerNormKernels kLayerNormKernels = {
    {{layer_norm_forward<float, float, float>, layer_norm_forward<float, Bf16, Bf16>,
      layer_norm_forward<Bf16, Bf16, Bf16>, layer_norm_forward<double, double, double>},
     {layer_norm_forward<float, float, float>, layer_norm_forward<float, Bf16, float>,
      layer_norm_forward<Bf16, Bf16, Bf16>, layer_norm_forward<double, double, double>}},
    {{layer_norm_backward<float, float, float>, layer_norm_backward<float, Bf16, Bf16>,
      layer_norm_backward<Bf16, Bf16, Bf16>, layer_norm_backward<double, double, double>},
     {layer_norm_backward<float, float, float>, layer_norm_backward<float, Bf16, float>,
      layer_norm_backward<Bf16, Bf16, Bf16>, layer_norm_backward<double, double, double>}}};

}  // namespace
}  // namespace capstan::ops::cpu
