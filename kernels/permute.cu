// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Order of tokens by expert, and rows moved by it: rows[place[n, j]] = x[n]; out[n] = sum_j w[n, j]
// rows[place[n, j]]; d_rows = w grad, d_w = grad . row.
// Memory per element of a row: permute one read and one write; combine one read; its backward two
// reads, one write. Reference: src/ops/permute.cpp.
#include "capstan/kernels/permute.h"

#include "dispatch.h"
#include "reduce.cuh"

namespace capstan::kernels {
namespace {

constexpr int kChunk = 1024, kChunkThreads = 256, kMostExperts = 1024, kScanThreads = 1024;

__device__ __forceinline__ int expert_of(const ExpertOrderArgs& a, int64_t slot) {
  return a.keep && a.keep[slot] == 0 ? -1 : static_cast<int>(a.chosen[slot]);
}

// counts[chunk][e]
__global__ void __launch_bounds__(kChunkThreads) count_chunk(const ExpertOrderArgs a) {
  __shared__ int counts[kMostExperts];
  for (int e = static_cast<int>(threadIdx.x); e < a.experts; e += kChunkThreads) counts[e] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  for (int i = static_cast<int>(threadIdx.x); i < kChunk; i += kChunkThreads) {
    if (first + i >= a.slots) break;
    const int e = expert_of(a, first + i);
    if (e >= 0) atomicAdd(&counts[e], 1);
  }
  __syncthreads();
  int* const out = a.workspace + blockIdx.x * a.experts;
  for (int e = static_cast<int>(threadIdx.x); e < a.experts; e += kChunkThreads) out[e] = counts[e];
}

// From counts to the first row of each (chunk, expert).
__global__ void __launch_bounds__(kScanThreads) scan_chunks(const ExpertOrderArgs a, int chunks) {
  __shared__ int64_t start[kMostExperts];
  const auto e = static_cast<int64_t>(threadIdx.x);
  int64_t count = 0;
  if (e < a.experts) {
    for (int c = 0; c < chunks; ++c) count += a.workspace[c * a.experts + e];
    start[e] = a.counts[e] = count;
  }
  __syncthreads();
  if (e == 0) {
    int64_t rows = 0;
    for (int64_t i = 0; i < a.experts; ++i) {
      const int64_t own = start[i];
      start[i] = rows;
      rows += own;
    }
  }
  __syncthreads();
  if (e >= a.experts) return;
  int64_t row = start[e];
  for (int c = 0; c < chunks; ++c) {
    int& place = a.workspace[c * a.experts + e];
    const int own = place;
    place = static_cast<int>(row);
    row += own;
  }
}

__global__ void __launch_bounds__(kChunkThreads) place_chunk(const ExpertOrderArgs a) {
  __shared__ int expert[kChunk];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int size = static_cast<int>(a.slots - first < kChunk ? a.slots - first : kChunk);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kChunkThreads)
    expert[i] = expert_of(a, first + i);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kChunkThreads) {
    const int mine = expert[i];
    if (mine < 0) {
      a.place[first + i] = -1;
      continue;
    }
    int before = 0;
    for (int j = 0; j < i; ++j) before += expert[j] == mine ? 1 : 0;
    const int64_t row = a.workspace[blockIdx.x * a.experts + mine] + before;
    a.place[first + i] = row;
    if (a.slot) a.slot[row] = first + i;
  }
}

template <class T, int N>
__global__ void permute_kernel(const PermuteTokensArgs a) {
  const int64_t row = a.shape.place[blockIdx.x], width = a.shape.width;
  if (row < 0) return;
  const T* const from = static_cast<const T*>(a.x) + blockIdx.x / a.shape.per_token * width;
  T* const to = static_cast<T*>(a.rows) + row * width;
  for (int64_t d = threadIdx.x * N; d < width; d += static_cast<int64_t>(blockDim.x) * N)
    store(to + d, load<N>(from + d));
}

template <class T, int N>
__global__ void combine_kernel(const CombineRowsArgs a) {
  using A = Wide<T>;
  const int64_t n = blockIdx.x, k = a.shape.per_token, width = a.shape.width;
  for (int64_t d = threadIdx.x * N; d < width; d += static_cast<int64_t>(blockDim.x) * N) {
    A sum[N] = {};
    for (int64_t j = n * k; j < (n + 1) * k; ++j) {
      const int64_t row = a.shape.place[j];
      if (row < 0) continue;
      const A weight = a.weights ? static_cast<const A*>(a.weights)[j] : A(1);
      const Vec<T, N> x = load<N>(static_cast<const T*>(a.rows) + row * width + d);
      CAPSTAN_UNROLL
      for (int i = 0; i < N; ++i) sum[i] += weight * widen(x.at[i]);
    }
    Vec<T, N> out;
    CAPSTAN_UNROLL
    for (int i = 0; i < N; ++i) out.at[i] = narrow<T>(sum[i]);
    store(static_cast<T*>(a.out) + n * width + d, out);
  }
}

template <class T, int N>
__global__ void combine_backward_kernel(const CombineRowsBackwardArgs a) {
  using A = Wide<T>;
  __shared__ A part[32];
  const int64_t slot = blockIdx.x, row = a.shape.place[slot], width = a.shape.width;
  if (row < 0) {
    if (threadIdx.x == 0) static_cast<A*>(a.d_weights)[slot] = A(0);
    return;
  }
  const A weight = static_cast<const A*>(a.weights)[slot];
  const T* const grad = static_cast<const T*>(a.grad) + slot / a.shape.per_token * width;
  A dot = 0;
  for (int64_t d = threadIdx.x * N; d < width; d += static_cast<int64_t>(blockDim.x) * N) {
    const Vec<T, N> g = load<N>(grad + d);
    const Vec<T, N> x = load<N>(static_cast<const T*>(a.rows) + row * width + d);
    Vec<T, N> dx;
    CAPSTAN_UNROLL
    for (int i = 0; i < N; ++i) {
      dot += widen(g.at[i]) * widen(x.at[i]);
      dx.at[i] = narrow<T>(weight * widen(g.at[i]));
    }
    store(static_cast<T*>(a.d_rows) + row * width + d, dx);
  }
  dot = block_reduce(dot, Sum{}, part);
  if (threadIdx.x == 0) static_cast<A*>(a.d_weights)[slot] = dot;
}

int64_t chunks_of(int64_t slots) { return (slots + kChunk - 1) / kChunk; }

bool check_shape(const char* name, const PermuteShape& s) {
  check_sizes(name, {s.tokens, s.per_token, s.width});
  if (s.tokens == 0 || s.per_token == 0 || s.width == 0) return false;
  check_present(name, {{"place", s.place}});
  return true;
}

// Launches one of two kernels, with vectors or without, with `blocks` blocks.
template <class T, class Args>
void launch_rows(const char* name, const PermuteShape& s, int64_t blocks, bool aligned,
                 void (*with_vectors)(Args), void (*without)(Args), const Args& args,
                 Stream stream) {
  const bool vectors = aligned && s.width % kVector<T> == 0;
  const int threads = threads_for_row(s.width, vectors ? kVector<T> : 1, 256);
  launch(name, {blocks, threads, 0}, stream, vectors ? with_vectors : without, args);
}

}  // namespace

size_t expert_order_workspace_bytes(int64_t slots, int64_t experts) {
  return static_cast<size_t>(chunks_of(slots) * experts) * sizeof(int);
}

void expert_order(const ExpertOrderArgs& args, Stream stream) {
  check_sizes("expert_order", {args.slots, args.experts});
  require(args.experts >= 1 && args.experts <= kMostExperts && args.slots < INT32_MAX,
          "expert_order", "{} slots of {} experts", {args.slots, args.experts});
  check_present("expert_order", {{"counts", args.counts}});
  const int64_t chunks = chunks_of(args.slots);
  if (chunks > 0) {
    check_present("expert_order",
                  {{"chosen", args.chosen}, {"place", args.place}, {"workspace", args.workspace}});
    launch("expert_order", {chunks, kChunkThreads, 0}, stream, count_chunk, args);
  }
  launch("expert_order", {1, kScanThreads, 0}, stream, scan_chunks, args, static_cast<int>(chunks));
  if (chunks > 0) launch("expert_order", {chunks, kChunkThreads, 0}, stream, place_chunk, args);
}

void permute_tokens(const PermuteTokensArgs& args, Stream stream) {
  const PermuteShape& s = args.shape;
  if (!check_shape("permute_tokens", s)) return;
  check_present("permute_tokens", {{"x", args.x}, {"rows", args.rows}});
  with_float("permute_tokens", s.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    launch_rows<T>("permute_tokens", s, s.tokens * s.per_token, are_aligned({args.x, args.rows}),
                   permute_kernel<T, kVector<T>>, permute_kernel<T, 1>, args, stream);
  });
}

void combine_rows(const CombineRowsArgs& args, Stream stream) {
  const PermuteShape& s = args.shape;
  if (!check_shape("combine_rows", s)) return;
  check_present("combine_rows", {{"rows", args.rows}, {"out", args.out}});
  with_float("combine_rows", s.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    launch_rows<T>("combine_rows", s, s.tokens, are_aligned({args.rows, args.out}),
                   combine_kernel<T, kVector<T>>, combine_kernel<T, 1>, args, stream);
  });
}

void combine_rows_backward(const CombineRowsBackwardArgs& args, Stream stream) {
  const PermuteShape& s = args.shape;
  if (!check_shape("combine_rows_backward", s)) return;
  check_present("combine_rows_backward", {{"grad", args.grad},
                                          {"rows", args.rows},
                                          {"weights", args.weights},
                                          {"d_rows", args.d_rows},
                                          {"d_weights", args.d_weights}});
  with_float("combine_rows_backward", s.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    launch_rows<T>("combine_rows_backward", s, s.tokens * s.per_token,
                   are_aligned({args.grad, args.rows, args.d_rows}),
                   combine_backward_kernel<T, kVector<T>>, combine_backward_kernel<T, 1>, args,
                   stream);
  });
}

}  // namespace capstan::kernels
