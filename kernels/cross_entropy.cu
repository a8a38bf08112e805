// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Softmax cross entropy on rows of logits, a block per row. One pass keeps a running maximum and
// the sum of exponentials scaled to it; a second one turns the row into its gradient:
//   logit <- weight (exp(logit - lse) - [column = target]).
// Memory per logit: statistics one read; fused with the gradient two reads (the second mostly from
// the cache), one write. Reference: src/ops/logits.cpp.
#include "capstan/kernels/cross_entropy.h"

#include "dispatch.h"
#include "reduce.cuh"

namespace capstan::kernels {
namespace {

constexpr int kMostThreads = 512, kVectorsPerThread = 4;

template <class A>
__device__ __forceinline__ A lowest() {
  return static_cast<A>(-INFINITY);
}

// visit(Vec<T, N>, first column) on all elements of a row, which need not start on a multiple of 16
// bytes.
template <class T, class Visit>
__device__ __forceinline__ void visit_row(const T* row, int64_t columns, const Visit& visit) {
  constexpr int kN = kVector<T>;
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int64_t head = past == 0 ? 0 : (kN - past < columns ? kN - past : columns);
  const int64_t vectors = (columns - head) / kN, tail = head + vectors * kN;
  const int64_t thread = threadIdx.x, threads = blockDim.x;
  if (thread < head) visit(load<1>(row + thread), thread);
  for (int64_t i = thread; i < vectors; i += threads)
    visit(load<kN>(row + head + i * kN), head + i * kN);
  if (tail + thread < columns) visit(load<1>(row + tail + thread), tail + thread);
}

template <class A>
struct RowStats {
  A top, sum;
};

// sum of exponentials scaled to `from`, scaled to `to` instead.
template <class A>
__device__ __forceinline__ A rescaled(A sum, A from, A to) {
  return sum == A(0) || from == to ? sum : sum * exp_of(from - to);
}

template <class T>
__device__ RowStats<Wide<T>> row_stats(const T* row, int64_t columns, Wide<T>* part) {
  using A = Wide<T>;
  RowStats<A> mine{lowest<A>(), A(0)};
  visit_row(row, columns, [&]<int N>(const Vec<T, N>& x, int64_t) {
    A top = mine.top;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) top = Max{}(top, static_cast<A>(widen(x.at[j])));
    mine.sum = rescaled(mine.sum, mine.top, top);
    mine.top = top;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      const A v = widen(x.at[j]);
      if (v != lowest<A>()) mine.sum += exp_of(v - top);
    }
  });
  const A top = block_reduce(mine.top, Max{}, part);
  return {top, block_reduce(rescaled(mine.sum, mine.top, top), Sum{}, part)};
}

template <class T>
__device__ void row_gradient(T* row, int64_t columns, int64_t target, Wide<T> shift, Wide<T> scale,
                             Wide<T> weight) {
  using A = Wide<T>;
  visit_row(row, columns, [&]<int N>(const Vec<T, N>& x, int64_t column) {
    Vec<T, N> out;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) {
      A d = exp_of(static_cast<A>(widen(x.at[j])) - shift) * scale;
      if (column + j == target) d -= weight;
      out.at[j] = narrow<T>(d);
    }
    store(row + column, out);
  });
}

template <class T>
__device__ void zero_row(T* row, int64_t columns) {
  visit_row(row, columns,
            [&]<int N>(const Vec<T, N>&, int64_t column) { store(row + column, Vec<T, N>{}); });
}

template <class T>
__device__ __forceinline__ T* row_of(const LogitRows& a, int64_t row) {
  return static_cast<T*>(a.logits) + row * a.row_stride;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) stats_kernel(const LogitStatsArgs a) {
  using A = Wide<T>;
  __shared__ A part[32];
  const int64_t n = blockIdx.x, target = a.logits.targets[n] - a.logits.first_column;
  const T* const row = row_of<T>(a.logits, n);
  const RowStats<A> stats = row_stats(row, a.logits.columns, part);
  if (threadIdx.x != 0) return;
  static_cast<A*>(a.top)[n] = stats.top;
  static_cast<A*>(a.sum)[n] = stats.sum;
  const bool is_here = a.logits.targets[n] >= 0 && target >= 0 && target < a.logits.columns;
  static_cast<A*>(a.picked)[n] = is_here ? widen(row[target]) : A(0);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) gradient_kernel(const LogitGradientArgs a) {
  using A = Wide<T>;
  const int64_t n = blockIdx.x, target = a.logits.targets[n];
  T* const row = row_of<T>(a.logits, n);
  if (target == kIgnoredTarget) return zero_row(row, a.logits.columns);
  const A weight = static_cast<const A*>(a.weights)[n];
  row_gradient(row, a.logits.columns, target - a.logits.first_column,
               static_cast<const A*>(a.lse)[n], weight, weight);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) fused_kernel(const CrossEntropyArgs a) {
  using A = Wide<T>;
  __shared__ A part[32];
  const int64_t n = blockIdx.x, target = a.logits.targets[n], columns = a.logits.columns;
  T* const row = row_of<T>(a.logits, n);
  if (target == kIgnoredTarget) {
    if (threadIdx.x == 0) static_cast<A*>(a.logprob)[n] = A(0);
    if (a.weights) zero_row(row, columns);
    return;
  }
  const RowStats<A> stats = row_stats(row, columns, part);
  if (threadIdx.x == 0)
    static_cast<A*>(a.logprob)[n] = widen(row[target]) - stats.top - log_of(stats.sum);
  if (!a.weights) return;
  __syncthreads();
  const A weight = static_cast<const A*>(a.weights)[n];
  row_gradient(row, columns, target, stats.top, weight / stats.sum, weight);
}

template <class A>
__global__ void rescale_kernel(const RescaleSumsArgs a) {
  for (int64_t n = first_index(); n < a.rows; n += all_threads()) {
    A* const sum = static_cast<A*>(a.sum) + n;
    *sum = rescaled(*sum, static_cast<const A*>(a.local_top)[n], static_cast<const A*>(a.top)[n]);
  }
}

template <class A>
__global__ void finish_kernel(const FinishStatsArgs a) {
  for (int64_t n = first_index(); n < a.rows; n += all_threads()) {
    const A lse = static_cast<const A*>(a.top)[n] + log_of(static_cast<const A*>(a.sum)[n]);
    static_cast<A*>(a.lse)[n] = lse;
    static_cast<A*>(a.logprob)[n] =
        a.targets[n] == kIgnoredTarget ? A(0) : static_cast<const A*>(a.picked)[n] - lse;
  }
}

// Whether there is anything to launch.
bool check_rows(const char* name, const LogitRows& a) {
  check_sizes(name, {a.rows, a.columns, a.row_stride});
  if (a.rows == 0) return false;
  check_present(name, {{"targets", a.targets}});
  if (a.columns > 0) check_present(name, {{"logits", a.logits}});
  require(a.columns <= a.row_stride, name, "{} columns in rows of {}", {a.columns, a.row_stride});
  return true;
}

template <class T>
LaunchShape shape_of(const LogitRows& a) {
  return {a.rows, threads_for_row(a.columns / kVector<T> + 1, kVectorsPerThread, kMostThreads), 0};
}

// Dtypes of statistics alone.
template <class Visit>
void with_wide(const char* name, DType dtype, const Visit& visit) {
  if (dtype == DType::kFp32) return visit(Tag<float>{});
  if (dtype == DType::kFp64) return visit(Tag<double>{});
  throw_bad_dtype(name, {dtype});
}

}  // namespace

void logit_stats(const LogitStatsArgs& args, Stream stream) {
  if (!check_rows("logit_stats", args.logits)) return;
  check_present("logit_stats", {{"top", args.top}, {"sum", args.sum}, {"picked", args.picked}});
  with_float("logit_stats", args.logits.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    launch("logit_stats", shape_of<T>(args.logits), stream, stats_kernel<T>, args);
  });
}

void logit_gradient(const LogitGradientArgs& args, Stream stream) {
  if (!check_rows("logit_gradient", args.logits) || args.logits.columns == 0) return;
  check_present("logit_gradient", {{"lse", args.lse}, {"weights", args.weights}});
  with_float("logit_gradient", args.logits.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    launch("logit_gradient", shape_of<T>(args.logits), stream, gradient_kernel<T>, args);
  });
}

void cross_entropy(const CrossEntropyArgs& args, Stream stream) {
  if (!check_rows("cross_entropy", args.logits)) return;
  check_present("cross_entropy", {{"logprob", args.logprob}});
  require(args.logits.columns > 0 && args.logits.first_column == 0, "cross_entropy",
          "{} columns from {}, not the whole vocabulary",
          {args.logits.columns, args.logits.first_column});
  with_float("cross_entropy", args.logits.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    launch("cross_entropy", shape_of<T>(args.logits), stream, fused_kernel<T>, args);
  });
}

void rescale_sums(const RescaleSumsArgs& args, Stream stream) {
  check_sizes("rescale_sums", {args.rows});
  if (args.rows == 0) return;
  check_present("rescale_sums",
                {{"local_top", args.local_top}, {"top", args.top}, {"sum", args.sum}});
  with_wide("rescale_sums", args.dtype, [&](auto tag) {
    launch("rescale_sums", flat_shape(args.rows, 1), stream, rescale_kernel<TypeOf<decltype(tag)>>,
           args);
  });
}

void finish_stats(const FinishStatsArgs& args, Stream stream) {
  check_sizes("finish_stats", {args.rows});
  if (args.rows == 0) return;
  check_present("finish_stats", {{"top", args.top},
                                 {"sum", args.sum},
                                 {"picked", args.picked},
                                 {"targets", args.targets},
                                 {"lse", args.lse},
                                 {"logprob", args.logprob}});
  with_wide("finish_stats", args.dtype, [&](auto tag) {
    launch("finish_stats", flat_shape(args.rows, 1), stream, finish_kernel<TypeOf<decltype(tag)>>,
           args);
  });
}

}  // namespace capstan::kernels
