// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Sum of squares in fp64 over tiles of a flat buffer: a block per tile, then one block over tiles,
// both in an order that only the tiles decide. An infinity or NaN makes its tile's sum non-finite.
// Memory per element: one read. Reference: src/optim/grad_norm.cpp.
#include "capstan/kernels/optimizer.h"
#include "dispatch.h"
#include "reduce.cuh"

namespace capstan::kernels {
namespace {

constexpr int kNormThreads = 256, kSumThreads = 1024;
constexpr int64_t kNormBlocks = 16384;

template <class T, int N>
__device__ __forceinline__ double squares_at(const T* from) {
  const Vec<T, N> x = load<N>(from);
  double sum = 0;
  CAPSTAN_UNROLL
  for (int j = 0; j < N; ++j) {
    const auto v = static_cast<double>(widen(x.at[j]));
    sum += v * v;
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    tile_squares(const SquaredNormArgs a, const bool is_aligned) {
  constexpr int kN = kVector<T>;
  __shared__ double part[32];
  const T* const values = static_cast<const T*>(a.values);
  for (int64_t t = blockIdx.x; t < a.tile_count; t += gridDim.x) {
    const Tile tile = a.tiles[t];
    const int vectors = is_aligned && tile.begin % kN == 0 ? tile.count / kN : 0;
    double sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kNormThreads)
      sum += squares_at<T, kN>(values + tile.begin + i * kN);
    for (int i = vectors * kN + static_cast<int>(threadIdx.x); i < tile.count; i += kNormThreads)
      sum += squares_at<T, 1>(values + tile.begin + i);
    sum = block_reduce(sum, Sum{}, part);
    if (threadIdx.x == 0) a.partial[t] = sum;
  }
}

__global__ void __launch_bounds__(kSumThreads) sum_tiles(const SquaredNormArgs a) {
  __shared__ double part[32];
  double sum = 0, broken = 0;
  for (int64_t t = threadIdx.x; t < a.tile_count; t += kSumThreads) {
    const double x = a.partial[t];
    if (!(fabs(x) <= 1.7976931348623157e308)) broken = 1;  // NaN too
    if ((a.tiles[t].flags & kCounted) != 0) sum += x;
  }
  sum = block_reduce(sum, Sum{}, part);
  broken = block_reduce(broken, Max{}, part);
  if (threadIdx.x != 0) return;
  *a.sum = a.add ? *a.sum + sum : sum;
  const int32_t before = a.add ? *a.non_finite : 0;
  *a.non_finite = broken != 0 ? 1 : before;
}

}  // namespace

void squared_norm(const SquaredNormArgs& args, Stream stream) {
  check_sizes("squared_norm", {args.tile_count});
  check_present("squared_norm", {{"sum", args.sum}, {"non_finite", args.non_finite}});
  if (args.tile_count > 0)
    check_present("squared_norm",
                  {{"values", args.values}, {"tiles", args.tiles}, {"partial", args.partial}});
  const int64_t blocks = args.tile_count < kNormBlocks ? args.tile_count : kNormBlocks;
  with_float("squared_norm", args.dtype, [&](auto tag) {
    if (args.tile_count > 0)
      launch("squared_norm", {blocks, kNormThreads, 0}, stream, tile_squares<TypeOf<decltype(tag)>>,
             args, are_aligned({args.values}));
  });
  launch("squared_norm", {1, kSumThreads, 0}, stream, sum_tiles, args);
}

}  // namespace capstan::kernels
