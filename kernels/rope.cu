// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// RoPE in place: a, b = x[i], x[i + H/2]; x[i] = a cos - b sin, x[i + H/2] = b cos + a sin; the
// backward has -sin.
// Memory per turned element: one read, one write. Reference: src/ops/rope.cpp.
#include "capstan/kernels/rope.h"

#include "dispatch.h"

namespace capstan::kernels {
namespace {

template <class T, int N>
__global__ void rope_rows(const RopeArgs a) {
  using A = Wide<T>;
  const int half = static_cast<int>(a.head_size / 2), per_head = half / N;
  const int items = static_cast<int>(a.heads) * per_head;
  const A direction = a.backward ? A(-1) : A(1);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t position = a.positions ? a.positions[row] : row % a.rows_per_sample;
    const A* const cos = static_cast<const A*>(a.cos) + position * half;
    const A* const sin = static_cast<const A*>(a.sin) + position * half;
    for (int item = static_cast<int>(threadIdx.x); item < items; item += blockDim.x) {
      const int head = item / per_head, d = (item - head * per_head) * N;
      T* const first = static_cast<T*>(a.x) + row * a.row_stride + head * a.head_size + d;
      const Vec<A, N> c = load<N>(cos + d), s = load<N>(sin + d);
      Vec<T, N> x = load<N>(first), y = load<N>(first + half);
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) {
        const A p = widen(x.at[j]), q = widen(y.at[j]), turn = s.at[j] * direction;
        x.at[j] = narrow<T>(p * c.at[j] - q * turn);
        y.at[j] = narrow<T>(q * c.at[j] + p * turn);
      }
      store(first, x);
      store(first + half, y);
    }
  }
}

}  // namespace

void rope(const RopeArgs& args, Stream stream) {
  check_sizes("rope", {args.rows, args.row_stride, args.heads, args.head_size});
  if (args.rows == 0 || args.heads == 0) return;
  check_present("rope", {{"x", args.x}, {"cos", args.cos}, {"sin", args.sin}});
  require(args.head_size > 0 && args.head_size % 2 == 0 &&
              args.heads * args.head_size <= args.row_stride && args.rows_per_sample > 0,
          "rope", "{} heads of {} in rows of {}", {args.heads, args.head_size, args.row_stride});
  with_float("rope", args.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    constexpr int kN = kVector<T>;
    const int64_t half = args.head_size / 2;
    const bool vectors =
        are_aligned({args.x, args.cos, args.sin}) && half % kN == 0 && args.row_stride % kN == 0;
    const int64_t items = args.heads * half / (vectors ? kN : 1);
    const LaunchShape shape{args.rows, threads_for_row(items, 1, 256), 0};
    launch("rope", shape, stream, vectors ? rope_rows<T, kN> : rope_rows<T, 1>, args);
  });
}

}  // namespace capstan::kernels
