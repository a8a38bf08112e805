// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What AdamW, Lion and Sophia on 8-bit moments share: a warp takes a block of 256 elements, decodes
// its moments, updates them and the weights, finds the largest of each and encodes them again
// (dynamic_code.h). Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.
// Reference: src/optim/cpu/loops.inc.
#pragma once
#include "optimizer_tile.cuh"
#include "reduce.cuh"

namespace capstan::kernels {

inline constexpr int kBlockLanes = 32;
inline constexpr int kPerLane = static_cast<int>(kMomentBlock) / kBlockLanes;
inline constexpr int kBlockWarps = kTileThreads / kBlockLanes;

// Place of the number next to x, in ascending order.
__device__ __forceinline__ int place_of(float x, const DynamicCode& code) {
  int place = 0;
  CAPSTAN_UNROLL
  for (int half = 128; half > 0; half /= 2) place += x > code.middle[place + half - 1] ? half : 0;
  return place;
}

// The largest of the block's magnitudes; all lanes of the warp call it together.
__device__ __forceinline__ float largest_of(const float* value) {
  float largest = 0;
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    const float size = value[j] < 0 ? -value[j] : value[j];
    largest = size > largest ? size : largest;
  }
  return warp_reduce(largest, Max{});
}

// The moments of a lane; all lanes of the warp call it together.
__device__ __forceinline__ void store_moments(const float* value, const DynamicCode& code,
                                              bool keeps_positive, uint8_t* bytes, float* scale) {
  const float largest = largest_of(value), divisor = largest > 0 ? largest : 1.0f;
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    int place = place_of(value[j] / divisor, code);
    if (keeps_positive && value[j] > 0 && place <= code.zero) place = code.zero + 1;
    bytes[j * kBlockLanes] = static_cast<uint8_t>(place - code.zero);
  }
  if (threadIdx.x % kBlockLanes == 0) *scale = largest;
}

// Copies a code to memory of the block; whole 32-bit words.
template <class Code>
__device__ __forceinline__ void load_code(uint32_t* words, const Code* code) {
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(Code) / 4);
       i += kTileThreads)
    words[i] = reinterpret_cast<const uint32_t*>(code)[i];
}

template <class G, class Update>
__device__ __forceinline__ void update_block(const BlockwiseArgs& a, const Update& update,
                                             const MomentCodes& codes, int64_t begin, bool decay) {
  constexpr bool kWritesSecond = Update::kHasSecond && !Update::kReadsSecondOnly;
  const int64_t mine = begin + static_cast<int>(threadIdx.x % kBlockLanes);
  const int64_t block = begin / kMomentBlock;
  const float first_scale = a.first_scale[block];
  float second_scale = 0;
  if constexpr (Update::kHasSecond) second_scale = a.second_scale[block];
  float* const weights = static_cast<float*>(a.weights) + mine;
  const G* const gradient = static_cast<const G*>(a.gradient_values) + mine;
  float first[kPerLane], second[kPerLane];
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    const int at = j * kBlockLanes;
    Element<float> e{weights[at], widen(gradient[at]),
                     codes.first.number[a.first[mine + at]] * first_scale, 0.0f};
    if constexpr (Update::kHasSecond)
      e.second = codes.second.number[a.second[mine + at]] * second_scale;
    update(e, decay);
    weights[at] = e.weight;
    first[j] = e.first;
    second[j] = e.second;
    if (a.copy) static_cast<Bf16*>(a.copy)[mine + at] = narrow<Bf16>(e.weight);
  }
  __syncwarp();  // every lane has read the scales
  store_moments(first, codes.first, false, a.first + mine, a.first_scale + block);
  if constexpr (kWritesSecond)
    store_moments(second, codes.second, true, a.second + mine, a.second_scale + block);
}

template <class G, template <class> class Update>
__global__ void __launch_bounds__(kTileThreads) update_blocks(const BlockwiseArgs a) {
  if (a.state->skip != 0) return;
  __shared__ Update<float> update;
  __shared__ uint32_t code_words[sizeof(MomentCodes) / 4];
  if (threadIdx.x == 0) update = Update<float>(a, *a.state);
  load_code(code_words, a.codes);
  __syncthreads();
  const Update<float> mine = update;
  const MomentCodes& codes = *reinterpret_cast<const MomentCodes*>(code_words);
  for (int64_t t = blockIdx.x; t < a.tile_count; t += gridDim.x) {
    const Tile tile = a.tiles[t];
    const int blocks = tile.count / static_cast<int>(kMomentBlock);
    for (int b = static_cast<int>(threadIdx.x) / kBlockLanes; b < blocks; b += kBlockWarps)
      update_block<G>(a, mine, codes, tile.begin + b * kMomentBlock, (tile.flags & kDecay) != 0);
  }
}

template <template <class> class Update>
void launch_blockwise(const char* name, const BlockwiseArgs& args, Stream stream) {
  check_sizes(name, {args.tile_count});
  if (args.tile_count == 0) return;
  check_present(name, {{"state", args.state},
                       {"tiles", args.tiles},
                       {"codes", args.codes},
                       {"weights", args.weights},
                       {"gradient", args.gradient_values},
                       {"first", args.first},
                       {"first_scale", args.first_scale}});
  if constexpr (Update<float>::kHasSecond)
    check_present(name, {{"second", args.second}, {"second_scale", args.second_scale}});
  const LaunchShape shape{args.tile_count < kTileBlocks ? args.tile_count : kTileBlocks,
                          kTileThreads, 0};
  if (args.gradient == DType::kFp32)
    return launch(name, shape, stream, update_blocks<float, Update>, args);
  if (args.gradient == DType::kBf16)
    return launch(name, shape, stream, update_blocks<Bf16, Update>, args);
  throw_bad_dtype(name, {args.gradient});
}

}  // namespace capstan::kernels
