// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW with 8-bit moments: a warp takes a block of 256 elements, decodes its moments, updates them
// and the weights, finds the largest of each and encodes them again (dynamic_code.h). Dettmers et
// al., "8-bit Optimizers via Block-wise Quantization", 2022.
// Memory per element with bf16 copy: 10 bytes read, 8 written, scales 1/16 more.
// Reference: src/optim/cpu/loops.inc, whose bits it gives as long as b^t does.
#include "adamw_update.cuh"
#include "reduce.cuh"

namespace capstan::kernels {
namespace {

constexpr int kLanes = 32, kPerLane = static_cast<int>(kMomentBlock) / kLanes;
constexpr int kWarps = kTileThreads / kLanes;
constexpr int kCodeWords = static_cast<int>(sizeof(MomentCodes) / sizeof(uint32_t));

__device__ __forceinline__ uint8_t encode(float x, const DynamicCode& code, bool keeps_positive) {
  int place = 0;
  CAPSTAN_UNROLL
  for (int half = 128; half > 0; half /= 2) place += x > code.middle[place + half - 1] ? half : 0;
  const int least = code.zero + 1;
  if (keeps_positive && place < least) place = least;
  return static_cast<uint8_t>(place - code.zero);
}

// The moments of a lane; all lanes of the warp call it together.
__device__ __forceinline__ void store_moments(const float* value, const DynamicCode& code,
                                              bool is_second, uint8_t* bytes, float* scale) {
  float largest = 0;
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    const float size = value[j] < 0 ? -value[j] : value[j];
    largest = size > largest ? size : largest;
  }
  largest = warp_reduce(largest, Max{});
  const float divisor = largest > 0 ? largest : 1.0f;
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j)
    bytes[j * kLanes] = encode(value[j] / divisor, code, is_second && value[j] > 0);
  if (threadIdx.x % kLanes == 0) *scale = largest;
}

template <class G>
__device__ __forceinline__ void update_block(const BlockwiseArgs& a,
                                             const AdamWUpdate<float>& update,
                                             const MomentCodes& codes, int64_t begin, bool decay) {
  const int64_t mine = begin + static_cast<int>(threadIdx.x % kLanes);
  const int64_t block = begin / kMomentBlock;
  const float first_scale = a.first_scale[block], second_scale = a.second_scale[block];
  float* const weights = static_cast<float*>(a.weights) + mine;
  const G* const gradient = static_cast<const G*>(a.gradient_values) + mine;
  float first[kPerLane], second[kPerLane];
  CAPSTAN_UNROLL
  for (int j = 0; j < kPerLane; ++j) {
    const int at = j * kLanes;
    Element<float> e{weights[at], widen(gradient[at]),
                     codes.first.number[a.first[mine + at]] * first_scale,
                     codes.second.number[a.second[mine + at]] * second_scale};
    update(e, decay);
    weights[at] = e.weight;
    first[j] = e.first;
    second[j] = e.second;
    if (a.copy) static_cast<Bf16*>(a.copy)[mine + at] = narrow<Bf16>(e.weight);
  }
  __syncwarp();  // every lane has read the scales
  store_moments(first, codes.first, false, a.first + mine, a.first_scale + block);
  store_moments(second, codes.second, true, a.second + mine, a.second_scale + block);
}

template <class G>
__global__ void __launch_bounds__(kTileThreads) update_blocks(const BlockwiseArgs a) {
  if (a.state->skip != 0) return;
  __shared__ AdamWUpdate<float> update;
  __shared__ uint32_t code_words[kCodeWords];
  if (threadIdx.x == 0) update = AdamWUpdate<float>(a, *a.state);
  for (int i = static_cast<int>(threadIdx.x); i < kCodeWords; i += kTileThreads)
    code_words[i] = reinterpret_cast<const uint32_t*>(a.codes)[i];
  __syncthreads();
  const AdamWUpdate<float> mine = update;
  const MomentCodes& codes = *reinterpret_cast<const MomentCodes*>(code_words);
  for (int64_t t = blockIdx.x; t < a.tile_count; t += gridDim.x) {
    const Tile tile = a.tiles[t];
    const int blocks = tile.count / static_cast<int>(kMomentBlock);
    for (int b = static_cast<int>(threadIdx.x) / kLanes; b < blocks; b += kWarps)
      update_block<G>(a, mine, codes, tile.begin + b * kMomentBlock, (tile.flags & kDecay) != 0);
  }
}

}  // namespace

void adamw_blockwise(const BlockwiseArgs& args, Stream stream) {
  const char* const name = "adamw_blockwise";
  check_sizes(name, {args.tile_count});
  if (args.tile_count == 0) return;
  check_present(name, {{"state", args.state},
                       {"tiles", args.tiles},
                       {"codes", args.codes},
                       {"weights", args.weights},
                       {"gradient", args.gradient_values},
                       {"first", args.first},
                       {"second", args.second},
                       {"first_scale", args.first_scale},
                       {"second_scale", args.second_scale}});
  const LaunchShape shape{args.tile_count < kTileBlocks ? args.tile_count : kTileBlocks,
                          kTileThreads, 0};
  if (args.gradient == DType::kFp32) return launch(name, shape, stream, update_blocks<float>, args);
  if (args.gradient == DType::kBf16) return launch(name, shape, stream, update_blocks<Bf16>, args);
  throw_bad_dtype(name, {args.gradient});
}

}  // namespace capstan::kernels
