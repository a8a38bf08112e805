// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// RMSNorm of each head of q and k, then RoPE: y = x r w, r = 1 / sqrt(mean(x^2) + eps) over a head;
// out = y turned. Backward: g = grad turned back, d = g w, h = x r; dx = r (d - h mean(d h)),
// dw = sum g h in two passes. A warp per head; a lane holds both numbers of its pairs.
// Memory per element: forward one read, one write; backward two reads, one write. Reference:
// src/ops/qk_norm.cpp, tests/kernels/qk_norm_test.cpp. A lane reads all of its pairs before it writes
// them, so results may take the place of inputs.
#include "capstan/kernels/qk_norm.h"

#include "reduce.cuh"
#include "sum_partial.cuh"

namespace capstan::kernels {
namespace {

constexpr int kPieces = 4, kWarps = 8, kMostHeadSize = 256;

// The pairs of a lane: elements i and i + H/2 for N consecutive i in each piece.
template <class A, int N>
struct Pairs {
  A low[kPieces][N], high[kPieces][N];
};

template <int N>
__device__ __forceinline__ int place_of(int piece) {
  return (piece * kWarp + static_cast<int>(threadIdx.x % kWarp)) * N;
}

template <class T, class A, int N>
__device__ __forceinline__ Pairs<A, N> read_pairs(const T* head, int half) {
  Pairs<A, N> out;
  CAPSTAN_UNROLL
  for (int p = 0; p < kPieces; ++p) {
    const int i = place_of<N>(p);
    Vec<T, N> low{}, high{};
    if (i < half) {
      low = load<N>(head + i);
      high = load<N>(head + half + i);
    }
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      out.low[p][j] = static_cast<A>(widen(low.at[j]));
      out.high[p][j] = static_cast<A>(widen(high.at[j]));
    }
  }
  return out;
}

template <class T, class A, int N>
__device__ __forceinline__ void write_pairs(T* head, int half, const Pairs<A, N>& in) {
  CAPSTAN_UNROLL
  for (int p = 0; p < kPieces; ++p) {
    const int i = place_of<N>(p);
    if (i >= half) continue;
    Vec<T, N> low, high;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      low.at[j] = narrow<T>(in.low[p][j]);
      high.at[j] = narrow<T>(in.high[p][j]);
    }
    store(head + i, low);
    store(head + half + i, high);
  }
}

template <class A, int N>
__device__ __forceinline__ void turn(Pairs<A, N>& x, const A* cos, const A* sin, int half,
                                     A direction) {
  CAPSTAN_UNROLL
  for (int p = 0; p < kPieces; ++p) {
    const int i = place_of<N>(p);
    if (i >= half) continue;
    const Vec<A, N> c = load<N>(cos + i), s = load<N>(sin + i);
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      const A a = x.low[p][j], b = x.high[p][j], turned = s.at[j] * direction;
      x.low[p][j] = a * c.at[j] - b * turned;
      x.high[p][j] = b * c.at[j] + a * turned;
    }
  }
}

// visit(low, high) on the pairs of two sets at once.
template <class A, int N, class Visit>
__device__ __forceinline__ void each(Pairs<A, N>& x, const Pairs<A, N>& y, const Visit& visit) {
  CAPSTAN_UNROLL
  for (int p = 0; p < kPieces; ++p) {
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      visit(x.low[p][j], y.low[p][j]);
      visit(x.high[p][j], y.high[p][j]);
    }
  }
}

// One head of one row.
template <class A>
struct Head {
  int64_t x_at, out_at, rstd_at;
  const A *cos, *sin;
  const void* weight;
  bool is_q;
};
template <class A>
__device__ __forceinline__ Head<A> head_at(const QkNormShape& s, int64_t row, int64_t head) {
  const int64_t half = s.head_size / 2;
  const int64_t position = s.positions ? s.positions[row] : row % s.rows_per_sample;
  const bool is_q = head < s.q_heads;
  return {row * s.x_stride + head * s.head_size,
          row * s.out_stride + head * s.head_size,
          row * (s.q_heads + s.k_heads) + head,
          static_cast<const A*>(s.cos) + position * half,
          static_cast<const A*>(s.sin) + position * half,
          is_q ? s.q_weight : s.k_weight,
          is_q};
}

template <class T, class W, int N>
__global__ void __launch_bounds__(kWarps* kWarp) forward_kernel(const QkNormForwardArgs a) {
  using A = Wide<T>;
  const QkNormShape& s = a.shape;
  const int half = static_cast<int>(s.head_size / 2);
  const int64_t heads = s.q_heads + s.k_heads;
  for (int64_t head = threadIdx.x / kWarp; head < heads; head += kWarps) {
    const Head<A> at = head_at<A>(s, blockIdx.x, head);
    Pairs<A, N> x = read_pairs<T, A, N>(static_cast<const T*>(a.x) + at.x_at, half);
    A squares = 0;
    each(x, x, [&](A& v, const A&) { squares += v * v; });
    squares = warp_reduce(squares, Sum{});
    const A rstd = A(1) / root_of(squares / static_cast<A>(s.head_size) + static_cast<A>(a.eps));
    if (threadIdx.x % kWarp == 0) static_cast<A*>(a.rstd)[at.rstd_at] = rstd;
    const Pairs<A, N> w = read_pairs<W, A, N>(static_cast<const W*>(at.weight), half);
    each(x, w, [&](A& v, const A& weight) { v = v * rstd * weight; });
    turn(x, at.cos, at.sin, half, A(1));
    write_pairs(static_cast<T*>(a.out) + at.out_at, half, x);
  }
}

// dx of one head; adds its share to the gradient of the weight.
template <class T, class W, int N>
__device__ __forceinline__ void backward_head(const QkNormBackwardArgs& a, const Head<Wide<T>>& at,
                                              Pairs<Wide<T>, N>& weight_sum) {
  using A = Wide<T>;
  const int half = static_cast<int>(a.shape.head_size / 2);
  const A rstd = static_cast<const A*>(a.rstd)[at.rstd_at];
  Pairs<A, N> grad = read_pairs<T, A, N>(static_cast<const T*>(a.grad) + at.out_at, half);
  Pairs<A, N> normed = read_pairs<T, A, N>(static_cast<const T*>(a.x) + at.x_at, half);
  turn(grad, at.cos, at.sin, half, A(-1));
  each(normed, normed, [&](A& h, const A&) { h *= rstd; });
  Pairs<A, N> product = grad;
  each(product, normed, [&](A& g, const A& h) { g *= h; });
  each(weight_sum, product, [&](A& sum, const A& gh) { sum += gh; });
  const Pairs<A, N> w = read_pairs<W, A, N>(static_cast<const W*>(at.weight), half);
  A mean = 0;
  each(product, w, [&](A& gh, const A& weight) { mean += gh * weight; });
  mean = warp_reduce(mean, Sum{}) / static_cast<A>(a.shape.head_size);
  each(grad, w, [&](A& g, const A& weight) { g *= weight; });
  each(grad, normed, [&](A& d, const A& h) { d = rstd * (d - h * mean); });
  write_pairs(static_cast<T*>(a.dx) + at.x_at, half, grad);
}

// Sums of the warps of a block, warp after warp.
template <class A, int N>
__device__ __forceinline__ void write_partial(const Pairs<A, N>& sum, int half, A* to) {
  __shared__ A shared[kWarps][kMostHeadSize];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  write_pairs(shared[warp], half, sum);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * half; i += kWarps * kWarp) {
    A total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared[w][i];
    to[i] = total;
  }
  __syncthreads();
}

template <class T, class W, int N>
__global__ void __launch_bounds__(kWarps* kWarp)
    backward_kernel(const QkNormBackwardArgs a, const RowGroups groups) {
  using A = Wide<T>;
  const QkNormShape& s = a.shape;
  const int64_t heads = s.q_heads + s.k_heads, first = blockIdx.x * groups.rows_per_group;
  const int64_t end = first + groups.rows_per_group, last = end < s.rows ? end : s.rows;
  Pairs<A, N> q_sum{}, k_sum{};
  for (int64_t i = threadIdx.x / kWarp; i < (last - first) * heads; i += kWarps) {
    const Head<A> at = head_at<A>(s, first + i / heads, i % heads);
    if (at.is_q)
      backward_head<T, W, N>(a, at, q_sum);
    else
      backward_head<T, W, N>(a, at, k_sum);
  }
  if (!a.partial) return;
  const int half = static_cast<int>(s.head_size / 2);
  A* const partial = static_cast<A*>(a.partial);
  write_partial(q_sum, half, partial + blockIdx.x * s.head_size);
  write_partial(k_sum, half, partial + (groups.groups + blockIdx.x) * s.head_size);
}

bool check_shape(const char* name, const QkNormShape& s) {
  check_sizes(name, {s.rows, s.q_heads, s.k_heads, s.head_size, s.x_stride, s.out_stride});
  const int64_t heads = s.q_heads + s.k_heads;
  require(
      s.head_size % 2 == 0 && s.head_size <= kMostHeadSize && heads * s.head_size <= s.x_stride &&
          heads * s.head_size <= s.out_stride && s.rows_per_sample > 0,
      name, "{} heads of {} in rows of {} and {}", {heads, s.head_size, s.x_stride, s.out_stride});
  if (s.rows == 0 || heads == 0 || s.head_size == 0) return false;
  check_present(
      name, {{"q_weight", s.q_weight}, {"k_weight", s.k_weight}, {"cos", s.cos}, {"sin", s.sin}});
  return true;
}

// visit(Tag<T>, Tag<W>)
template <class Visit>
void with_types(const char* name, const QkNormShape& s, const Visit& visit) {
  const auto is = [&](DType t, DType w) { return s.dtype == t && s.weight_dtype == w; };
  if (is(DType::kBf16, DType::kBf16)) return visit(Tag<Bf16>{}, Tag<Bf16>{});
  if (is(DType::kBf16, DType::kFp32)) return visit(Tag<Bf16>{}, Tag<float>{});
  if (is(DType::kFp32, DType::kFp32)) return visit(Tag<float>{}, Tag<float>{});
  if (is(DType::kFp64, DType::kFp64)) return visit(Tag<double>{}, Tag<double>{});
  throw_bad_dtype(name, {s.dtype, s.weight_dtype});
}

// Whether lanes may take two neighbours at a time.
bool takes_two(const QkNormShape& s, std::initializer_list<const void*> pointers) {
  return are_aligned(pointers) && are_aligned({s.q_weight, s.k_weight, s.cos, s.sin}) &&
         s.head_size % 4 == 0 && s.x_stride % 2 == 0 && s.out_stride % 2 == 0;
}

}  // namespace

void qk_norm_rope_forward(const QkNormForwardArgs& args, Stream stream) {
  if (!check_shape("qk_norm_rope_forward", args.shape)) return;
  check_present("qk_norm_rope_forward", {{"x", args.x}, {"out", args.out}, {"rstd", args.rstd}});
  with_types("qk_norm_rope_forward", args.shape, [&](auto t, auto w) {
    using T = TypeOf<decltype(t)>;
    using W = TypeOf<decltype(w)>;
    const bool two = takes_two(args.shape, {args.x, args.out});
    launch("qk_norm_rope_forward", {args.shape.rows, kWarps * kWarp, 0}, stream,
           two ? forward_kernel<T, W, 2> : forward_kernel<T, W, 1>, args);
  });
}

void qk_norm_rope_backward(const QkNormBackwardArgs& args, Stream stream) {
  constexpr const char* kName = "qk_norm_rope_backward";
  if (!check_shape(kName, args.shape)) return;
  check_present(kName, {{"x", args.x}, {"rstd", args.rstd}, {"grad", args.grad}, {"dx", args.dx}});
  const bool wants_weights = args.grad_q_weight || args.grad_k_weight;
  if (wants_weights)
    check_present(kName, {{"partial", args.partial},
                          {"grad_q_weight", args.grad_q_weight},
                          {"grad_k_weight", args.grad_k_weight}});
  const RowGroups groups = row_groups(args.shape.rows);
  QkNormBackwardArgs own = args;
  if (!wants_weights) own.partial = nullptr;
  with_types(kName, args.shape, [&](auto t, auto w) {
    using T = TypeOf<decltype(t)>;
    using W = TypeOf<decltype(w)>;
    const bool two = takes_two(args.shape, {args.x, args.grad, args.dx});
    launch(kName, {groups.groups, kWarps * kWarp, 0}, stream,
           two ? backward_kernel<T, W, 2> : backward_kernel<T, W, 1>, own, groups);
    if (!wants_weights) return;
    const int64_t size = args.shape.head_size;
    launch_sum_partial<Wide<T>>(kName, args.partial, 0, groups.groups, size, args.grad_q_weight,
                                stream);
    launch_sum_partial<Wide<T>>(kName, args.partial, 1, groups.groups, size, args.grad_k_weight,
                                stream);
  });
}

}  // namespace capstan::kernels
