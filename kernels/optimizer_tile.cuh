// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What AdamW, Lion and Sophia on moments of one number per element share: a block takes one tile at
// a time; vectors where the tile starts on a multiple of four elements. Update is a functor on one
// element.
#pragma once
#include "capstan/kernels/optimizer.h"
#include "dispatch.h"
#include "philox.cuh"

namespace capstan::kernels {

inline constexpr int kTileThreads = 256, kTileVector = 4;
inline constexpr int64_t kTileBlocks = 16384;

// x^n by squaring: the same bits everywhere.
__device__ inline double integer_power(double x, int64_t n) {
  double power = 1.0;
  for (; n > 0; n /= 2) {
    if (n % 2 == 1) power *= x;
    x *= x;
  }
  return power;
}

template <class A>
struct Element {
  A weight, gradient, first, second;
};

// What a moment is stored as: as it is, or rounded by random bits.
template <class M, class A>
__device__ __forceinline__ M store_moment(A x, uint32_t random) {
  if constexpr (sizeof(M) == 2)
    return round_stochastically(static_cast<float>(x), random);
  else
    return static_cast<M>(x);
}

template <class A, class G, class M, int N, class Update>
__device__ __forceinline__ void update_vector(const OptimizerArgs& a, const Update& update,
                                              uint64_t count, int64_t at, uint64_t index,
                                              bool decay) {
  A* const weights = static_cast<A*>(a.weights) + at;
  M* const first = static_cast<M*>(a.first) + at;
  M* const second = Update::kHasSecond ? static_cast<M*>(a.second) + at : nullptr;
  Vec<A, N> w = load<N>(weights);
  const Vec<G, N> g = load<N>(static_cast<const G*>(a.gradient) + at);
  Vec<M, N> m = load<N>(first), v{};
  if constexpr (Update::kHasSecond) v = load<N>(second);
  CAPSTAN_UNROLL
  for (int j = 0; j < N; ++j) {
    Element<A> e{w.at[j], static_cast<A>(widen(g.at[j])), static_cast<A>(widen(m.at[j])),
                 static_cast<A>(widen(v.at[j]))};
    update(e, decay);
    PhiloxBits random{};
    if constexpr (sizeof(M) == 2) random = philox(a.seed, count, index + static_cast<uint64_t>(j));
    w.at[j] = e.weight;
    m.at[j] = store_moment<M>(e.first, random.word[0]);
    if constexpr (Update::kHasSecond) v.at[j] = store_moment<M>(e.second, random.word[1]);
  }
  store(weights, w);
  store(first, m);
  if constexpr (Update::kHasSecond && !Update::kReadsSecondOnly) store(second, v);
  if constexpr (sizeof(A) == 4) {
    if (!a.copy) return;
    Vec<Bf16, N> rounded;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) rounded.at[j] = narrow<Bf16>(w.at[j]);
    store(static_cast<Bf16*>(a.copy) + at, rounded);
  }
}

template <class A, class G, class M, template <class> class Update>
__global__ void __launch_bounds__(kTileThreads)
    update_tiles(const OptimizerArgs a, const bool is_aligned) {
  if (a.state->skip != 0) return;
  __shared__ Update<A> update;
  if (threadIdx.x == 0) update = Update<A>(a, *a.state);
  __syncthreads();
  const Update<A> mine = update;
  const auto count = static_cast<uint64_t>(a.state->count);
  for (int64_t t = blockIdx.x; t < a.tile_count; t += gridDim.x) {
    const Tile tile = a.tiles[t];
    const bool decay = (tile.flags & kDecay) != 0;
    const int vectors = is_aligned && tile.begin % kTileVector == 0 ? tile.count / kTileVector : 0;
    for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kTileThreads)
      update_vector<A, G, M, kTileVector>(a, mine, count, tile.begin + i * kTileVector,
                                          tile.index + static_cast<uint64_t>(i) * kTileVector,
                                          decay);
    for (int i = vectors * kTileVector + static_cast<int>(threadIdx.x); i < tile.count;
         i += kTileThreads)
      update_vector<A, G, M, 1>(a, mine, count, tile.begin + i,
                                tile.index + static_cast<uint64_t>(i), decay);
  }
}

template <template <class> class Update>
void launch_update(const char* name, const OptimizerArgs& args, Stream stream) {
  const bool aligned =
      are_aligned({args.weights, args.gradient, args.first, args.second, args.copy});
  const LaunchShape shape{args.tile_count < kTileBlocks ? args.tile_count : kTileBlocks,
                          kTileThreads, 0};
  const auto is = [&](DType w, DType g, DType m) {
    return args.types.weights == w && args.types.gradient == g && args.types.moments == m;
  };
  const auto run = [&](auto* kernel) { launch(name, shape, stream, kernel, args, aligned); };
  constexpr auto k32 = DType::kFp32, k16 = DType::kBf16, k64 = DType::kFp64;
  if (is(k32, k32, k32)) return run(update_tiles<float, float, float, Update>);
  if (is(k32, k16, k32)) return run(update_tiles<float, Bf16, float, Update>);
  if (is(k32, k32, k16)) return run(update_tiles<float, float, Bf16, Update>);
  if (is(k32, k16, k16)) return run(update_tiles<float, Bf16, Bf16, Update>);
  if (is(k64, k64, k64)) return run(update_tiles<double, double, double, Update>);
  throw_bad_dtype(name, {args.types.weights, args.types.gradient, args.types.moments});
}

// Whether there is anything to launch.
inline bool check_optimizer(const char* name, const OptimizerArgs& args) {
  check_sizes(name, {args.tile_count});
  if (args.tile_count == 0) return false;
  check_present(name, {{"state", args.state},
                       {"tiles", args.tiles},
                       {"weights", args.weights},
                       {"gradient", args.gradient},
                       {"first", args.first}});
  require(args.copy == nullptr || args.types.weights == DType::kFp32, name,
          "a copy beside weights that are not fp32");
  return true;
}

}  // namespace capstan::kernels
