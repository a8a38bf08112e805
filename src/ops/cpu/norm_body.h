// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Body of the norm kernels, compiled once per instruction set. R: residual type, C: compute type,
// W: type of the weight.
#pragma once
#include "ops/cpu/norm_kernels.h"
#include "ops/cpu/vector.h"

namespace capstan::ops::cpu {
namespace {

template <class R, class C, class W>
void norm_forward(const NormForwardArgs& a, int64_t row_begin, int64_t row_end) {
  using Scalar = ScalarOf<R>;
  constexpr int kStep = kLanes<R>;
  const W* const weight = static_cast<const W*>(a.weight);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t at = row * a.width;
    const R* const residual = static_cast<const R*>(a.residual) + at;
    const C* const hidden = a.hidden ? static_cast<const C*>(a.hidden) + at : nullptr;
    R* const sum = static_cast<R*>(a.sum) + at;
    C* const normed = static_cast<C*>(a.normed) + at;
    VecOf<R> squares{};
    for (int64_t d = 0; d < a.width; d += kStep) {
      VecOf<R> x = load_part(residual + d, a.width - d);
      if (hidden) {
        x = rounded_to(sum, x + load_part(hidden + d, a.width - d));
        store_part(sum + d, x, a.width - d);
      }
      squares += x * x;
    }
    const Scalar mean = sum_lanes(squares) / static_cast<Scalar>(a.width);
    const Scalar rstd =
        Scalar(1) / static_cast<Scalar>(__builtin_sqrt(mean + static_cast<Scalar>(a.eps)));
    static_cast<Scalar*>(a.rstd)[row] = rstd;
    for (int64_t d = 0; d < a.width; d += kStep) {
      const VecOf<R> x = load_part(sum + d, a.width - d);
      store_part(normed + d, x * rstd * load_part(weight + d, a.width - d), a.width - d);
    }
  }
}

template <class R, class C, class W>
CAPSTAN_INLINE void norm_backward_row(const NormBackwardArgs& a, int64_t row,
                                      ScalarOf<R>* partial) {
  using Scalar = ScalarOf<R>;
  constexpr int kStep = kLanes<R>;
  const int64_t at = row * a.width;
  const R* const x = static_cast<const R*>(a.x) + at;
  const C* const grad = static_cast<const C*>(a.grad) + at;
  const W* const weight = static_cast<const W*>(a.weight);
  R* const dx = static_cast<R*>(a.dx) + at;
  C* const d_hidden = a.d_hidden ? static_cast<C*>(a.d_hidden) + at : nullptr;
  const Scalar rstd = static_cast<const Scalar*>(a.rstd)[row];
  VecOf<R> dot{};
  for (int64_t d = 0; d < a.width; d += kStep) {
    const int64_t left = a.width - d;
    const VecOf<R> gx = load_part(grad + d, left) * load_part(x + d, left);
    dot += gx * load_part(weight + d, left);
    if (partial) store_part(partial + d, load_part(partial + d, left) + gx * rstd, left);
  }
  const Scalar c = sum_lanes(dot) * rstd * rstd * rstd / static_cast<Scalar>(a.width);
  for (int64_t d = 0; d < a.width; d += kStep) {
    const int64_t left = a.width - d;
    VecOf<R> v =
        load_part(grad + d, left) * load_part(weight + d, left) * rstd - load_part(x + d, left) * c;
    if (a.add_to_dx) v += load_part(dx + d, left);
    store_part(dx + d, v, left);
    if (d_hidden) store_part(d_hidden + d, v, left);
  }
}

template <class R, class C, class W>
void norm_backward(const NormBackwardArgs& a, int64_t group_begin, int64_t group_end) {
  using Scalar = ScalarOf<R>;
  for (int64_t group = group_begin; group < group_end; ++group) {
    Scalar* const partial = a.partial ? static_cast<Scalar*>(a.partial) + group * a.width : nullptr;
    if (partial)
      for (int64_t d = 0; d < a.width; ++d) partial[d] = 0;
    const int64_t first = group * a.rows_per_group;
    const int64_t last = first + a.rows_per_group < a.rows ? first + a.rows_per_group : a.rows;
    for (int64_t row = first; row < last; ++row) norm_backward_row<R, C, W>(a, row, partial);
  }
}

constexpr NormKernels kNormKernels = {
    {{norm_forward<float, float, float>, norm_forward<float, Bf16, Bf16>,
      norm_forward<Bf16, Bf16, Bf16>, norm_forward<double, double, double>},
     {norm_forward<float, float, float>, norm_forward<float, Bf16, float>,
      norm_forward<Bf16, Bf16, Bf16>, norm_forward<double, double, double>}},
    {{norm_backward<float, float, float>, norm_backward<float, Bf16, Bf16>,
      norm_backward<Bf16, Bf16, Bf16>, norm_backward<double, double, double>},
     {norm_backward<float, float, float>, norm_backward<float, Bf16, float>,
      norm_backward<Bf16, Bf16, Bf16>, norm_backward<double, double, double>}}};

}  // namespace
}  // namespace capstan::ops::cpu
