// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW, Lion and Sophia on flat buffers, the gradient norm, and the state of a step that lives on
// the device so that the host never waits for it. Matches src/optim/flat_update.cpp,
// src/optim/grad_norm.cpp and the rules of src/engine/step_control.cpp.
#pragma once
#include <span>
#include <vector>

#include "capstan/kernels/dynamic_code.h"
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

// In device memory. The host writes lr, and all of it before the first step of a process;
// decide_step writes the rest.
struct StepState {
  double lr = 0;
  double gradient_scale = 1;  // clip factor / loss scale
  double norm = 0;            // of the true gradient
  int64_t count = 0;          // updates so far; bias correction uses the number of this one
  int32_t skip = 0;           // 1: optimizers do nothing
  int32_t padding = 0;
  double loss_scale = 1;   // of the step at hand; behind decide_step that of the next one
  int64_t good_steps = 0;  // in a row at that scale
  int64_t taken = 0;       // steps that the windows of SpikeRule have taken in
};

// A piece of a flat buffer, so small that a block takes one. In device memory, made once.
struct Tile {
  int64_t begin = 0;
  int32_t count = 0;
  int32_t flags = 0;   // kDecay, kCounted
  uint64_t index = 0;  // of its first element in the model, for random bits
};
inline constexpr int32_t kDecay = 1, kCounted = 2;
struct FlatRange {
  int64_t begin = 0, end = 0;
  int32_t flags = 0;
  uint64_t index = 0;
};
inline constexpr int64_t kTileElements = 4096;
// Cuts ranges at multiples of kTileElements. On the host.
[[nodiscard]] std::vector<Tile> cut_tiles(std::span<const FlatRange> ranges);

// With b1, b2 = beta1, beta2, t = count, g = gradient_scale x gradient:
//   AdamW: w <- w (1 - lr decay); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
//          w <- w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
//   Lion:  w <- w (1 - lr decay) - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g
//   Sophia: m <- b1 m + (1 - b1) g; w <- w (1 - lr decay) - lr clip(m / (rho h + 1e-15), 1) with
//          h = second, which is only read
// bf16 moments are rounded stochastically by Philox bits of (seed, count, the element's index in
// the model = index of its tile + place in it): words 0 and 1 of a draw for m and v. Bytes per
// element, fp32 with bf16 copy: AdamW 16 read, 14 written; with bf16 moments 12 and 10; Sophia,
// which does not write h, 4 or 2 less written.
struct OptimizerTypes {
  DType weights = DType::kFp32;   // or fp64
  DType gradient = DType::kFp32;  // that of the weights, or bf16 beside fp32
  DType moments = DType::kFp32;   // that of the weights, or bf16 beside fp32
};
struct OptimizerArgs {
  OptimizerTypes types;
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  double rho = 0;  // Sophia
  uint64_t seed = 0;
  const StepState* state = nullptr;
  const Tile* tiles = nullptr;
  int64_t tile_count = 0;
  void* weights = nullptr;
  const void* gradient = nullptr;
  void* first = nullptr;
  void* second = nullptr;  // not Lion
  void* copy = nullptr;    // bf16 beside fp32 weights, or null
};
void adamw(const OptimizerArgs& args, Stream stream);
void lion(const OptimizerArgs& args, Stream stream);
void sophia(const OptimizerArgs& args, Stream stream);

// The same on fp32 weights with 8-bit moments: a block of 256 elements has one scale per moment
// (dynamic_code.h). The moments of this update go into the weights before they are rounded. Tiles
// begin and end with blocks. Bytes per element with a bf16 copy: AdamW 10 read, 8 written, scales
// 1/16.
struct BlockwiseArgs {
  DType gradient = DType::kFp32;  // or bf16
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  double rho = 0;  // Sophia
  const StepState* state = nullptr;
  const Tile* tiles = nullptr;
  int64_t tile_count = 0;
  const MomentCodes* codes = nullptr;  // kMomentCodes
  void* weights = nullptr;
  const void* gradient_values = nullptr;
  uint8_t *first = nullptr, *second = nullptr;
  float *first_scale = nullptr, *second_scale = nullptr;  // one per 256 elements
  void* copy = nullptr;                                   // bf16, or null
};                                                        // no second nor its scale: Lion
inline constexpr int64_t kMomentBlock = 256;
void adamw_blockwise(const BlockwiseArgs& args, Stream stream);
void lion_blockwise(const BlockwiseArgs& args, Stream stream);
void sophia_blockwise(const BlockwiseArgs& args, Stream stream);

// Sophia's h <- b2 h + (1 - b2) B g^2 with g = gradient_scale x gradient of a mean over B tokens;
// where that is not finite h stays. bf16 h is rounded stochastically by word 1 of the Philox bits
// of (seed, state's count, index). 8-bit h (dynamic_code.h, second) as well, between two numbers of
// the code, 0 among them; tiles begin and end with blocks. Runs whatever state's skip says. Bytes
// per element, fp32: 8 read, 4 written; bf16 h 6 and 2; 8-bit h 5 and 1.
struct CurvatureArgs {
  OptimizerTypes types;  // moments: that of h; also uint8 beside fp32
  double beta2 = 0.99, tokens = 1, gradient_scale = 1;
  uint64_t seed = 0;
  const StepState* state = nullptr;
  const Tile* tiles = nullptr;
  int64_t tile_count = 0;
  const void* gradient = nullptr;
  void* curvature = nullptr;
  const MomentCodes* codes = nullptr;  // kMomentCodes; 8-bit h, as the scales
  float* curvature_scale = nullptr;    // one per 256 elements
};
void sophia_curvature(const CurvatureArgs& args, Stream stream);

// sum = sum of squares of the tiles flagged kCounted, in fp64 and in a fixed order; non_finite is 1
// if any tile holds an infinity or NaN, else 0. Several buffers: `add` from the second one on.
// Bytes per element: one read.
struct SquaredNormArgs {
  DType dtype = DType::kFp32;
  const void* values = nullptr;
  const Tile* tiles = nullptr;
  int64_t tile_count = 0;
  double* partial = nullptr;  // [tile_count] work space
  double* sum = nullptr;
  int32_t* non_finite = nullptr;
  bool add = false;
};
void squared_norm(const SquaredNormArgs& args, Stream stream);

// Of a step, added up over ranks. The flags are 0 where nothing was infinite or NaN.
struct StepSums {
  double loss = 0, squares = 0;  // squares of gradients with the loss scale in them
  double non_finite_loss = 0, non_finite_gradient = 0;
};
// A step that is not finite takes the scale down, `interval` others in a row take it up. As
// src/optim/loss_scale.cpp.
struct LossScaleRule {
  int64_t interval = 0;  // 0: the scale is fixed
  double growth = 2, backoff = 0.5;
  double smallest = 1, largest = 1;
};
// Deviations above the mean of a window of steps that make loss or norm a spike, to the bit as
// src/optim/spike.cpp.
struct SpikeRule {
  double sigma = 0;
  int64_t window = 0;  // steps; 0: none is a spike
};
// norm = sqrt(squares) / loss scale; the clip factor is min(1, max_norm / (norm + 1e-6)), or 1 when
// max_norm is 0. A step that is void (no targets), not finite or a spike is skipped and not
// counted.
struct DecideStepArgs {
  const StepSums* sums = nullptr;
  const double* is_void = nullptr;  // 0 or 1
  double max_norm = 0;
  LossScaleRule loss_scale = {};
  SpikeRule spikes = {};
  double* windows = nullptr;  // [2, window]: losses and norms, value i of all at i % window
  StepState* state = nullptr;
};
void decide_step(const DecideStepArgs& args, Stream stream);

}  // namespace capstan::kernels
