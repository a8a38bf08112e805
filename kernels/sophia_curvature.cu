// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Sophia's estimate of the curvature on flat buffers: h <- b2 h + (1 - b2) B g^2 (Liu et al.,
// "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training", 2023,
// algorithm 2), in one pass. Where that is not finite h stays.
// Memory per element, fp32: 8 bytes read, 4 written; with bf16 h 6 and 2, with 8-bit h 5 and 1.
// Reference: src/optim/cpu/loops.inc, the same bits.
#include <type_traits>

#include "optimizer_block.cuh"

namespace capstan::kernels {
namespace {

template <class A>
struct Estimate {
  A scale, weight, beta2;

  __device__ __forceinline__ A operator()(A gradient, A h) const {
    const A g = gradient * scale;
    const A made = (g * g) * weight + h * beta2;
    return made - made == A(0) ? made : h;
  }
};

// 0 to 255; between two numbers of the code by the random bits, right on average.
__device__ __forceinline__ uint8_t encode_stochastically(float x, const DynamicCode& code,
                                                         uint32_t random) {
  const int near = place_of(x, code);
  const int below = code.number[near] > x ? near - 1 : near;
  const int above = below < 255 ? below + 1 : 255;
  const float low = code.number[below], gap = code.number[above] - low;
  const bool up = static_cast<float>(random >> 8) * 0x1p-24f * gap < x - low;
  return static_cast<uint8_t>(up ? above : below);
}

template <class A, class G, class H>
__global__ void __launch_bounds__(kTileThreads)
    estimate_tiles(const CurvatureArgs a, const Estimate<A> estimate) {
  const auto count = std::is_same_v<H, Bf16> ? static_cast<uint64_t>(a.state->count) : 0;
  for (int64_t t = blockIdx.x; t < a.tile_count; t += gridDim.x) {
    const Tile tile = a.tiles[t];
    for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += kTileThreads) {
      const int64_t at = tile.begin + i;
      H* const h = static_cast<H*>(a.curvature) + at;
      const A made = estimate(static_cast<A>(widen(static_cast<const G*>(a.gradient)[at])),
                              static_cast<A>(widen(*h)));
      uint32_t random = 0;
      if constexpr (std::is_same_v<H, Bf16>)
        random = philox(a.seed, count, tile.index + static_cast<uint64_t>(i)).word[1];
      *h = store_moment<H>(made, random);
    }
  }
}

template <class G>
__device__ __forceinline__ void estimate_block(const CurvatureArgs& a,
                                               const Estimate<float>& estimate,
                                               const DynamicCode& code, int64_t begin,
                                               uint64_t index) {
  const int lane = static_cast<int>(threadIdx.x % kBlockLanes);
  uint8_t* const bytes = static_cast<uint8_t*>(a.curvature) + begin + lane;
  const G* const gradient = static_cast<const G*>(a.gradient) + begin + lane;
  float* const scale = a.curvature_scale + begin / kMomentBlock;
  const float before = *scale;
  float h[kPerLane];
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    const int at = j * kBlockLanes;
    h[j] = estimate(widen(gradient[at]), code.number[bytes[at]] * before);
  }
  const float largest = largest_of(h), divisor = largest > 0 ? largest : 1.0f;
  const auto count = static_cast<uint64_t>(a.state->count);
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    const int at = j * kBlockLanes;
    const uint64_t place = index + static_cast<uint64_t>(lane + at);
    bytes[at] = encode_stochastically(h[j] / divisor, code, philox(a.seed, count, place).word[1]);
  }
  __syncwarp();  // every lane has read the scale
  if (lane == 0) *scale = largest;
}

template <class G>
__global__ void __launch_bounds__(kTileThreads)
    estimate_blocks(const CurvatureArgs a, const Estimate<float> estimate) {
  __shared__ uint32_t code_words[sizeof(DynamicCode) / 4];
  load_code(code_words, &a.codes->second);
  __syncthreads();
  const DynamicCode& code = *reinterpret_cast<const DynamicCode*>(code_words);
  for (int64_t t = blockIdx.x; t < a.tile_count; t += gridDim.x) {
    const Tile tile = a.tiles[t];
    const int blocks = tile.count / static_cast<int>(kMomentBlock);
    for (int b = static_cast<int>(threadIdx.x) / kBlockLanes; b < blocks; b += kBlockWarps) {
      const int64_t begin = b * kMomentBlock;
      estimate_block<G>(a, estimate, code, tile.begin + begin,
                        tile.index + static_cast<uint64_t>(begin));
    }
  }
}

template <class A>
Estimate<A> estimate_of(const CurvatureArgs& a) {
  return {static_cast<A>(a.gradient_scale), static_cast<A>((1.0 - a.beta2) * a.tokens),
          static_cast<A>(a.beta2)};
}

}  // namespace

void sophia_curvature(const CurvatureArgs& args, Stream stream) {
  const char* const name = "sophia_curvature";
  check_sizes(name, {args.tile_count});
  if (args.tile_count == 0) return;
  check_present(name, {{"tiles", args.tiles},
                       {"gradient", args.gradient},
                       {"curvature", args.curvature},
                       {"state", args.state}});
  const LaunchShape shape{args.tile_count < kTileBlocks ? args.tile_count : kTileBlocks,
                          kTileThreads, 0};
  const auto is = [&](DType w, DType g, DType h) {
    return args.types.weights == w && args.types.gradient == g && args.types.moments == h;
  };
  constexpr auto k32 = DType::kFp32, k16 = DType::kBf16, k64 = DType::kFp64, k8 = DType::kUint8;
  const auto run = [&](auto* kernel) {
    launch(name, shape, stream, kernel, args, estimate_of<float>(args));
  };
  if (is(k32, k32, k8) || is(k32, k16, k8)) {
    check_present(name, {{"codes", args.codes}, {"curvature_scale", args.curvature_scale}});
    return args.types.gradient == k32 ? run(estimate_blocks<float>) : run(estimate_blocks<Bf16>);
  }
  if (is(k32, k32, k32)) return run(estimate_tiles<float, float, float>);
  if (is(k32, k16, k32)) return run(estimate_tiles<float, Bf16, float>);
  if (is(k32, k32, k16)) return run(estimate_tiles<float, float, Bf16>);
  if (is(k32, k16, k16)) return run(estimate_tiles<float, Bf16, Bf16>);
  if (is(k64, k64, k64))
    return launch(name, shape, stream, estimate_tiles<double, double, double>, args,
                  estimate_of<double>(args));
  throw_bad_dtype(name, {args.types.weights, args.types.gradient, args.types.moments});
}

}  // namespace capstan::kernels
