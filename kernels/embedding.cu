// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Embedding: out[n] = table[ids[n]]; backward buffer[ids[n]] += grad[n] in the order of n.
// The backward groups the tokens of a chunk by row, counting how many stand before each; the first
// token of a group links it to the groups of its row in other chunks. One of these first tokens,
// whichever came last, owns the row and adds all groups, chunk after chunk: the same order, and so
// the same bits, whoever owns it.
// Memory per element: forward one read, one write; backward one read, and a read and a write of
// the rows in use. Reference: src/ops/embedding.cpp.
#include "capstan/kernels/embedding.h"

#include <algorithm>

#include "dispatch.h"

namespace capstan::kernels {
namespace {

constexpr int kChunk = 1024, kGroupThreads = 256;
constexpr int kMostChunks = 512;  // tokens of one pass
constexpr int kSumThreads = 128, kTokensPerBlock = 4, kInFlight = 4;

template <class From, class To, int N>
__global__ void gather_rows(const EmbeddingForwardArgs a) {
  const int64_t n = blockIdx.x, row = a.ids[n] - a.shape.first_row, width = a.shape.width;
  const bool is_here = row >= 0 && row < a.shape.rows;
  const From* const from = static_cast<const From*>(a.table) + (is_here ? row : 0) * width;
  To* const to = static_cast<To*>(a.out) + n * width;
  for (int64_t d = threadIdx.x * N; d < width; d += static_cast<int64_t>(blockDim.x) * N) {
    Vec<To, N> out{};
    if (is_here) {
      const Vec<From, N> in = load<N>(from + d);
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) out.at[j] = narrow<To>(static_cast<Wide<To>>(widen(in.at[j])));
    }
    store(to + d, out);
  }
}

// Indices of one pass over at most kMostChunks chunks.
struct Groups {
  const int64_t* ids;
  int64_t first_row, rows, tokens;
  int* last;   // [V]: the first token of the group of a row that was linked last; -1: none
  int* link;   // [N]: the group linked before, of the first token of a group
  int* start;  // [N]: where the group begins in `order`, of its first token
  int* count;  // [N]: tokens of the group, of its first token
  int* order;  // [N]: tokens of each chunk, group after group
};

__device__ __forceinline__ int row_of(const Groups& g, int64_t token) {
  const int64_t row = g.ids[token] - g.first_row;
  return row >= 0 && row < g.rows ? static_cast<int>(row) : -1;
}

__global__ void clear_last(int* last, int64_t rows) {
  for (int64_t i = first_index(); i < rows; i += all_threads()) last[i] = -1;
}

__global__ void group_tokens(const Groups g) {
  __shared__ int row[kChunk];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int size = static_cast<int>(g.tokens - first < kChunk ? g.tokens - first : kChunk);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kGroupThreads)
    row[i] = row_of(g, first + i);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kGroupThreads) {
    const int mine = row[i];
    int smaller = 0, before = 0, same = 0;
    for (int j = 0; j < size; ++j) {
      smaller += row[j] < mine ? 1 : 0;
      same += row[j] == mine ? 1 : 0;
      before += row[j] == mine && j < i ? 1 : 0;
    }
    const int token = static_cast<int>(first) + i, place = static_cast<int>(first) + smaller;
    g.order[place + before] = token;
    if (before > 0 || mine < 0) continue;
    g.start[token] = place;
    g.count[token] = same;
    g.link[token] = atomicExch(&g.last[mine], token);
  }
}

// The groups of a row as first tokens, ascending. The whole block calls it.
__device__ int collect_groups(const Groups& g, int owner, int* found, int* sorted) {
  __shared__ int total;
  if (threadIdx.x == 0) {
    int count = 0;
    for (int token = owner; token >= 0; token = g.link[token]) found[count++] = token;
    total = count;
  }
  __syncthreads();
  const int count = total;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSumThreads) {
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += found[j] < found[i] ? 1 : 0;
    sorted[rank] = found[i];
  }
  __syncthreads();
  return count;
}

// sum += grad[order[i]] for i in [begin, end), one after another, with several loads on their way.
template <class T, class A, int N>
__device__ __forceinline__ void add_group(const Groups& g, const T* grad, int64_t width, int begin,
                                          int end, A (&sum)[N]) {
  for (int i = begin; i < end; i += kInFlight) {
    Vec<T, N> row[kInFlight] = {};
    CAPSTAN_UNROLL
    for (int k = 0; k < kInFlight; ++k)
      if (i + k < end) row[k] = load<N>(grad + g.order[i + k] * width);
    CAPSTAN_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (i + k >= end) break;
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) sum[j] += static_cast<A>(widen(row[k].at[j]));
    }
  }
}

template <class From, class To, int N>
__global__ void sum_rows(const Groups g, const From* grad, To* buffer, int64_t width, int tiles) {
  using A = Wide<To>;
  __shared__ int found[kMostChunks], sorted[kMostChunks];
  const int64_t block = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t d = (tile * kSumThreads + threadIdx.x) * N;
  for (int t = 0; t < kTokensPerBlock; ++t) {
    const int64_t token = block * kTokensPerBlock + t;
    if (token >= g.tokens) return;
    const int row = row_of(g, token);
    if (row < 0 || g.last[row] != token) continue;
    const int count = collect_groups(g, static_cast<int>(token), found, sorted);
    if (d < width) {
      To* const to = buffer + row * width + d;
      Vec<To, N> value = load<N>(to);
      A sum[N];
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) sum[j] = widen(value.at[j]);
      for (int i = 0; i < count; ++i) {
        const int begin = g.start[sorted[i]];
        add_group<From, A, N>(g, grad + d, width, begin, begin + g.count[sorted[i]], sum);
      }
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) value.at[j] = narrow<To>(sum[j]);
      store(to, value);
    }
    __syncthreads();
  }
}

// visit(Tag<From>, Tag<To>)
template <class Visit>
void with_pair(const char* name, DType from, DType to, const Visit& visit) {
  with_float(name, from, [&](auto f) {
    with_float(name, to, [&](auto t) {
      if constexpr ((sizeof(TypeOf<decltype(f)>) == 8) == (sizeof(TypeOf<decltype(t)>) == 8))
        visit(f, t);
      else
        throw_bad_dtype(name, {from, to});
    });
  });
}

int64_t tokens_per_pass(int64_t tokens) {
  return std::min<int64_t>(tokens, int64_t{kMostChunks} * kChunk);
}

template <class From, class To, int N>
void launch_sum(const EmbeddingBackwardArgs& args, const Groups& g, int64_t done, Stream stream) {
  const int64_t width = args.shape.width, per_tile = int64_t{kSumThreads} * N;
  const int64_t tiles = (width + per_tile - 1) / per_tile;
  const int64_t blocks = (g.tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  launch("embedding_backward", {blocks * tiles, kSumThreads, 0}, stream, sum_rows<From, To, N>, g,
         static_cast<const From*>(args.grad) + done * width, static_cast<To*>(args.buffer), width,
         static_cast<int>(tiles));
}

void backward_pass(const EmbeddingBackwardArgs& args, int64_t done, int64_t tokens, Stream stream) {
  const EmbeddingShape& s = args.shape;
  const int64_t most = tokens_per_pass(s.tokens);
  int* const work = static_cast<int*>(args.workspace);
  const Groups g{args.ids + done,
                 s.first_row,
                 s.rows,
                 tokens,
                 work,
                 work + s.rows,
                 work + s.rows + most,
                 work + s.rows + 2 * most,
                 work + s.rows + 3 * most};
  launch("embedding_backward", flat_shape(s.rows, 1), stream, clear_last, g.last, s.rows);
  launch("embedding_backward", {(tokens + kChunk - 1) / kChunk, kGroupThreads, 0}, stream,
         group_tokens, g);
  with_pair("embedding_backward", args.grad_dtype, args.buffer_dtype, [&](auto from, auto to) {
    using From = TypeOf<decltype(from)>;
    using To = TypeOf<decltype(to)>;
    constexpr int kN = kVector<From, To>;
    if (are_aligned({args.grad, args.buffer}) && s.width % kN == 0)
      launch_sum<From, To, kN>(args, g, done, stream);
    else
      launch_sum<From, To, 1>(args, g, done, stream);
  });
}

}  // namespace

void embedding_forward(const EmbeddingForwardArgs& args, Stream stream) {
  const EmbeddingShape& s = args.shape;
  check_sizes("embedding_forward", {s.tokens, s.width, s.rows});
  if (s.tokens == 0 || s.width == 0) return;
  check_present("embedding_forward", {{"ids", args.ids}, {"out", args.out}});
  if (s.rows > 0) check_present("embedding_forward", {{"table", args.table}});
  with_pair("embedding_forward", args.table_dtype, args.out_dtype, [&](auto from, auto to) {
    using From = TypeOf<decltype(from)>;
    using To = TypeOf<decltype(to)>;
    constexpr int kN = kVector<From, To>;
    const bool vectors = are_aligned({args.table, args.out}) && s.width % kN == 0;
    const LaunchShape shape{s.tokens, threads_for_row(s.width, vectors ? kN : 1, 256), 0};
    launch("embedding_forward", shape, stream,
           vectors ? gather_rows<From, To, kN> : gather_rows<From, To, 1>, args);
  });
}

size_t embedding_workspace_bytes(const EmbeddingShape& shape) {
  return static_cast<size_t>(shape.rows + 4 * tokens_per_pass(shape.tokens)) * sizeof(int);
}

void embedding_backward(const EmbeddingBackwardArgs& args, Stream stream) {
  const EmbeddingShape& s = args.shape;
  check_sizes("embedding_backward", {s.tokens, s.width, s.rows});
  if (s.tokens == 0 || s.width == 0 || s.rows == 0) return;
  check_present("embedding_backward", {{"grad", args.grad},
                                       {"ids", args.ids},
                                       {"buffer", args.buffer},
                                       {"workspace", args.workspace}});
  require(s.rows < INT32_MAX, "embedding_backward", "{} rows", {s.rows});
  const int64_t pass = tokens_per_pass(s.tokens);
  for (int64_t done = 0; done < s.tokens; done += pass)
    backward_pass(args, done, std::min(pass, s.tokens - done), stream);
}

}  // namespace capstan::kernels
