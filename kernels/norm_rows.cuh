// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Device code that RMSNorm and LayerNorm share; kCentered: the mean is taken off. A row stays in
// the registers of its threads between the sums and the output (RowShape).
#pragma once
#include "capstan/kernels/norm.h"
#include "dispatch.h"
#include "reduce.cuh"
#include "sum_partial.cuh"

namespace capstan::kernels {

// Where a thread stands: its row of the block, its place in the row.
struct RowPlace {
  int slot, thread, warps, first_warp;
  __device__ explicit RowPlace(const RowShape& s)
      : slot(static_cast<int>(threadIdx.x) / s.threads_per_row),
        thread(static_cast<int>(threadIdx.x) % s.threads_per_row),
        warps(s.threads_per_row / 32),
        first_warp(slot * warps) {}
  template <int N>
  __device__ int64_t column(int chunk, const RowShape& s) const {
    return (static_cast<int64_t>(chunk) * s.threads_per_row + thread) * N;
  }
};

template <class R, class C, int N>
__device__ __forceinline__ Vec<R, N> added(Vec<R, N> residual, const Vec<C, N>& hidden) {
  CAPSTAN_UNROLL
  for (int j = 0; j < N; ++j)
    residual.at[j] = narrow<R>(widen(residual.at[j]) + static_cast<Wide<R>>(widen(hidden.at[j])));
  return residual;
}

// The row at `offset` in wide form; adds and stores the sum where there is something to add.
template <class R, class C, int N, int kChunks>
__device__ __forceinline__ void read_row(const NormForwardArgs& a, const RowShape& s,
                                         const RowPlace& place, int64_t offset, bool is_row,
                                         Wide<R> (&x)[kChunks][N]) {
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int64_t d = place.column<N>(c, s);
    Vec<R, N> v{};
    if (is_row && d < a.shape.width) {
      v = load<N>(static_cast<const R*>(a.residual) + offset + d);
      if (a.hidden) {
        v = added<R, C, N>(v, load<N>(static_cast<const C*>(a.hidden) + offset + d));
        store(static_cast<R*>(a.sum) + offset + d, v);
      }
    }
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) x[c][j] = widen(v.at[j]);
  }
}

template <class R, class C, class W, int N, int kChunks, bool kCentered>
__global__ void __launch_bounds__(kMostRowThreads)
    norm_forward(const NormForwardArgs a, const RowShape s) {
  using A = Wide<R>;
  __shared__ A part[32];
  const RowPlace place(s);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * s.rows_per_block + place.slot;
  const int64_t width = a.shape.width, offset = row * width;
  const bool is_row = row < a.shape.rows;
  A x[kChunks][N];
  read_row<R, C, N, kChunks>(a, s, place, offset, is_row, x);
  A mean = 0, squares = 0;
  if constexpr (kCentered) {
    A total = 0;
    CAPSTAN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) total += x[c][j];
    }
    mean = group_reduce(total, Sum{}, part, place.first_warp, place.warps) / static_cast<A>(width);
  }
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    if (place.column<N>(c, s) >= width) continue;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) squares += (x[c][j] - mean) * (x[c][j] - mean);
  }
  squares = group_reduce(squares, Sum{}, part, place.first_warp, place.warps);
  const A rstd = A(1) / root_of(squares / static_cast<A>(width) + static_cast<A>(a.eps));
  if (!is_row) return;
  if (place.thread == 0) {
    static_cast<A*>(a.rstd)[row] = rstd;
    if constexpr (kCentered) static_cast<A*>(a.mean)[row] = mean;
  }
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int64_t d = place.column<N>(c, s);
    if (d >= width) continue;
    const Vec<W, N> w = load<N>(static_cast<const W*>(a.weight) + d);
    Vec<W, N> b{};
    if (kCentered && a.bias) b = load<N>(static_cast<const W*>(a.bias) + d);
    Vec<C, N> out;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j)
      out.at[j] = narrow<C>((x[c][j] - mean) * rstd * static_cast<A>(widen(w.at[j])) +
                            static_cast<A>(widen(b.at[j])));
    store(static_cast<C*>(a.normed) + offset + d, out);
  }
}

// One row of the backward as it was read; everything else is made again from it, which costs
// fewer registers than keeping it.
template <class R, class C, int N, int kChunks>
struct BackwardRow {
  Vec<R, N> x[kChunks];
  Vec<C, N> grad[kChunks];
  Wide<R> mean, rstd;

  __device__ __forceinline__ Wide<R> normed(int c, int j) const {
    return (widen(x[c].at[j]) - mean) * rstd;
  }
  __device__ __forceinline__ Wide<R> gradient(int c, int j) const {
    return static_cast<Wide<R>>(widen(grad[c].at[j]));
  }
};

template <class R, class C, int N, int kChunks>
__device__ __forceinline__ BackwardRow<R, C, N, kChunks> read_backward_row(
    const NormBackwardArgs& a, const RowShape& s, const RowPlace& place, int64_t row, bool is_row) {
  using A = Wide<R>;
  BackwardRow<R, C, N, kChunks> out;
  out.rstd = is_row ? static_cast<const A*>(a.rstd)[row] : A(0);
  out.mean = is_row && a.mean ? static_cast<const A*>(a.mean)[row] : A(0);
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int64_t d = place.column<N>(c, s), at = row * a.shape.width + d;
    out.x[c] = Vec<R, N>{};
    out.grad[c] = Vec<C, N>{};
    if (!is_row || d >= a.shape.width) continue;
    out.x[c] = load<N>(static_cast<const R*>(a.x) + at);
    out.grad[c] = load<N>(static_cast<const C*>(a.grad) + at);
  }
  return out;
}

template <class R, class C, class W, int N, int kChunks>
__device__ __forceinline__ void write_backward_row(const NormBackwardArgs& a, const RowShape& s,
                                                   const RowPlace& place, int64_t row,
                                                   const BackwardRow<R, C, N, kChunks>& in,
                                                   Wide<R> mean_weighted, Wide<R> mean_product) {
  using A = Wide<R>;
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int64_t d = place.column<N>(c, s), at = row * a.shape.width + d;
    if (d >= a.shape.width) continue;
    const Vec<W, N> weight = load<N>(static_cast<const W*>(a.weight) + d);
    Vec<R, N> more{}, dx;
    if (a.grad_residual) more = load<N>(static_cast<const R*>(a.grad_residual) + at);
    Vec<C, N> hidden;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      const A weighted = in.gradient(c, j) * static_cast<A>(widen(weight.at[j]));
      const A v =
          in.rstd * (weighted - mean_weighted - in.normed(c, j) * mean_product) + widen(more.at[j]);
      dx.at[j] = narrow<R>(v);
      hidden.at[j] = narrow<C>(v);
    }
    store(static_cast<R*>(a.dx) + at, dx);
    if (a.d_hidden) store(static_cast<C*>(a.d_hidden) + at, hidden);
  }
}

// Sums of the rows of a block, slot after slot, into one row of the work space.
template <class A, int N, int kChunks>
__device__ __forceinline__ void write_partial(const RowShape& s, const RowPlace& place,
                                              int64_t width, const A (&sum)[kChunks][N], A* to) {
  A* const shared = shared_memory<A>();
  __syncthreads();
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      const int64_t d = place.column<N>(c, s) + j;
      if (place.slot > 0 && d < width) shared[(place.slot - 1) * width + d] = sum[c][j];
    }
  }
  __syncthreads();
  if (place.slot > 0) return;
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      const int64_t d = place.column<N>(c, s) + j;
      if (d >= width) continue;
      A total = sum[c][j];
      for (int slot = 1; slot < s.rows_per_block; ++slot) total += shared[(slot - 1) * width + d];
      to[d] = total;
    }
  }
}

// What the rows of a block add up to.
template <class A, int N, int kChunks>
struct BackwardSums {
  A weight[kChunks][N] = {}, bias[kChunks][N] = {};
};
template <class A>
struct RowSums {
  A weighted, product;  // of grad weight, and of that times the normed value
};

template <class R, class C, class W, int N, int kChunks, bool kCentered>
__device__ __forceinline__ RowSums<Wide<R>> sum_backward_row(
    const NormBackwardArgs& a, const RowShape& s, const RowPlace& place,
    const BackwardRow<R, C, N, kChunks>& in, BackwardSums<Wide<R>, N, kChunks>& sums) {
  using A = Wide<R>;
  RowSums<A> row{A(0), A(0)};
  CAPSTAN_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int64_t d = place.column<N>(c, s);
    if (d >= a.shape.width) continue;
    const Vec<W, N> weight = load<N>(static_cast<const W*>(a.weight) + d);
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      const A grad = in.gradient(c, j), normed = in.normed(c, j);
      const A weighted = grad * static_cast<A>(widen(weight.at[j]));
      row.weighted += weighted;
      row.product += weighted * normed;
      sums.weight[c][j] += grad * normed;
      if constexpr (kCentered) sums.bias[c][j] += grad;
    }
  }
  return row;
}

template <class R, class C, class W, int N, int kChunks, bool kCentered>
__global__ void __launch_bounds__(kMostRowThreads)
    norm_backward(const NormBackwardArgs a, const RowShape s, const RowGroups groups) {
  using A = Wide<R>;
  __shared__ A part[32];
  const RowPlace place(s);
  const int64_t width = a.shape.width, first = blockIdx.x * groups.rows_per_group;
  const int64_t end = first + groups.rows_per_group;
  const int64_t last = end < a.shape.rows ? end : a.shape.rows;
  BackwardSums<A, N, kChunks> sums;
  for (int64_t base = first; base < last; base += s.rows_per_block) {
    const int64_t row = base + place.slot;
    const auto in = read_backward_row<R, C, N, kChunks>(a, s, place, row, row < last);
    RowSums<A> of_row = sum_backward_row<R, C, W, N, kChunks, kCentered>(a, s, place, in, sums);
    of_row.product = group_reduce(of_row.product, Sum{}, part, place.first_warp, place.warps);
    if constexpr (kCentered)
      of_row.weighted = group_reduce(of_row.weighted, Sum{}, part, place.first_warp, place.warps);
    else
      of_row.weighted = A(0);
    if (row < last)
      write_backward_row<R, C, W, N, kChunks>(a, s, place, row, in,
                                              of_row.weighted / static_cast<A>(width),
                                              of_row.product / static_cast<A>(width));
  }
  A* const partial = static_cast<A*>(a.partial);
  if (a.grad_weight)
    write_partial<A, N, kChunks>(s, place, width, sums.weight, partial + blockIdx.x * width);
  if (kCentered && a.grad_bias)
    write_partial<A, N, kChunks>(s, place, width, sums.bias,
                                 partial + (groups.groups + blockIdx.x) * width);
}

// visit(Tag<R>, Tag<C>, Tag<W>)
template <class Visit>
void with_norm_types(const char* kernel, const NormTypes& t, const Visit& visit) {
  const auto is = [&](DType r, DType c, DType w) {
    return t.residual == r && t.compute == c && t.weight == w;
  };
  constexpr auto k32 = DType::kFp32, k16 = DType::kBf16, k64 = DType::kFp64;
  if (is(k32, k32, k32)) return visit(Tag<float>{}, Tag<float>{}, Tag<float>{});
  if (is(k32, k16, k16)) return visit(Tag<float>{}, Tag<Bf16>{}, Tag<Bf16>{});
  if (is(k32, k16, k32)) return visit(Tag<float>{}, Tag<Bf16>{}, Tag<float>{});
  if (is(k16, k16, k16)) return visit(Tag<Bf16>{}, Tag<Bf16>{}, Tag<Bf16>{});
  if (is(k16, k16, k32)) return visit(Tag<Bf16>{}, Tag<Bf16>{}, Tag<float>{});
  if (is(k64, k64, k64)) return visit(Tag<double>{}, Tag<double>{}, Tag<double>{});
  throw_bad_dtype(kernel, {t.residual, t.compute, t.weight});
}

template <bool kCentered>
void launch_forward(const char* name, const NormForwardArgs& a, Stream stream) {
  with_norm_types(name, a.types, [&](auto r, auto c, auto w) {
    using R = TypeOf<decltype(r)>;
    using C = TypeOf<decltype(c)>;
    using W = TypeOf<decltype(w)>;
    constexpr int kN = kVector<R, C>;
    const bool aligned = are_aligned({a.residual, a.hidden, a.weight, a.bias, a.sum, a.normed});
    const RowShape s = row_shape(a.shape.width, kN, aligned);
    require(s.chunks > 0, name, "rows of {} elements", {a.shape.width});
    const LaunchShape shape{(a.shape.rows + s.rows_per_block - 1) / s.rows_per_block, s.threads(),
                            0};
    const auto run = [&](auto* kernel) { launch(name, shape, stream, kernel, a, s); };
    if (s.vector == 1)
      run(norm_forward<R, C, W, 1, 16, kCentered>);
    else if (s.chunks == 1)
      run(norm_forward<R, C, W, kN, 1, kCentered>);
    else
      run(norm_forward<R, C, W, kN, 4, kCentered>);
  });
}

template <bool kCentered>
void launch_backward(const char* name, const NormBackwardArgs& a, Stream stream) {
  const RowGroups groups = row_groups(a.shape.rows);
  with_norm_types(name, a.types, [&](auto r, auto c, auto w) {
    using R = TypeOf<decltype(r)>;
    using C = TypeOf<decltype(c)>;
    using W = TypeOf<decltype(w)>;
    using A = Wide<R>;
    constexpr int kN = kVector<R, C>;
    const bool aligned = are_aligned({a.x, a.weight, a.grad, a.grad_residual, a.dx, a.d_hidden});
    const RowShape s = row_shape(a.shape.width, kN, aligned);
    require(s.chunks > 0, name, "rows of {} elements", {a.shape.width});
    const auto shared = static_cast<int64_t>(sizeof(A)) * (s.rows_per_block - 1) * a.shape.width;
    const LaunchShape shape{groups.groups, s.threads(), shared};
    const auto run = [&](auto* kernel) { launch(name, shape, stream, kernel, a, s, groups); };
    if (s.vector == 1)
      run(norm_backward<R, C, W, 1, 16, kCentered>);
    else if (s.chunks == 1)
      run(norm_backward<R, C, W, kN, 1, kCentered>);
    else
      run(norm_backward<R, C, W, kN, 4, kCentered>);
    const auto sum = [&](int which, void* total) {
      launch_sum_partial<A>(name, a.partial, which, groups.groups, a.shape.width, total, stream);
    };
    if (a.grad_weight) sum(0, a.grad_weight);
    if (kCentered && a.grad_bias) sum(1, a.grad_bias);
  });
}

}  // namespace capstan::kernels
