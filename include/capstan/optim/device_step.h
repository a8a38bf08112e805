// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A step decided on the accelerator: gradient norm, clip factor, whether the step counts and the
// next loss scale are computed where the gradients are, and read there. The rules are those of
// engine/step_control; by our kernels where they are installed, else by ATen. Nothing here makes
// the host wait for the device.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "capstan/optim/loss_scale.h"
#include "capstan/optim/spike.h"
#include "capstan/parallel/shard.h"

namespace capstan::optim {

using at::Tensor;

// Views of one kernels::StepState in device memory, all without dims but `bytes`.
struct StepNumbers {
  Tensor bytes;                     // the whole struct, as uint8
  Tensor lr, gradient_scale, norm;  // fp64; the scale is clip factor / loss scale
  Tensor count;                     // int64: updates so far, this one included
  Tensor skip;                      // int32: 1 = optimizers leave everything as it is
  Tensor loss_scale;                // fp64: of the step at hand, from decide() on of the next one
  Tensor good_steps;                // int64: in a row at that scale
  Tensor taken;                     // int64: steps that the windows of spikes have taken in
};
[[nodiscard]] StepNumbers make_step_numbers(at::Device device);

// What is added up over ranks, fp64 on the device: [4], in this order (kernels::StepSums).
struct DeviceSums {
  enum Place { kLoss = 0, kSquares = 1, kNonFiniteLoss = 2, kNonFiniteGradient = 3, kCount = 4 };
};

struct DeviceStepOptions {
  double max_norm = 0;  // 0 = no clipping
  LossScaleOptions loss_scale = {};
  SpikeOptions spikes = {};
};

// What decisions rest on beside the sums of a step, as the host keeps it.
struct DecisionState {
  int64_t count = 0;
  double loss_scale = 1;
  int64_t good_steps = 0;
  std::vector<double> losses, norms;  // windows of spikes, oldest first
};

class DeviceStep {
 public:
  // Gradients of all shards are on `device`; the shards' memory must outlive this.
  DeviceStep(const std::vector<parallel::Shard>& shards, at::Device device,
             const DeviceStepOptions& options);

  // Numbers of the step at hand, and of the updates before it; a step that is void is skipped. The
  // calls below read them on the device and have fixed arguments: they may be captured.
  void set_step(double lr, bool is_void);
  void restore(const DecisionState& state);
  // Writes kSquares and kNonFiniteGradient of this rank into sums [4].
  void sum_squares(const Tensor& sums);
  // For updates in the backward, before the step is decided: from open_updates to close_updates
  // the numbers are those of a step that counts unless it is void; add_squares is sum_squares of
  // one shard, on top of sums that begin as zeros. close_updates takes the count back for decide.
  void open_updates();
  void add_squares(size_t shard, const Tensor& sums);
  void close_updates();
  // From sums over all ranks: norm, scale and skip; counts the step if it is not skipped, and says
  // with which loss scale the next one runs. A step is skipped if anything in it is not finite, if
  // it is void or a spike.
  void decide(const Tensor& sums);
  [[nodiscard]] const StepNumbers& numbers() const { return numbers_; }

 private:
  struct Tiled {
    Tensor gradient, tiles;  // kernels::Tile, as bytes
    int64_t count = 0;
  };
  void cut_tiles(const std::vector<parallel::Shard>& shards);
  void square(const Tiled& tiled, const Tensor& squares);
  void decide_by_aten(const Tensor& sums);
  [[nodiscard]] Tensor take_into_windows(const Tensor& values_2, const Tensor& counts);
  void rescale(const Tensor& broken);

  const std::vector<parallel::Shard>& shards_;
  DeviceStepOptions options_;
  StepNumbers numbers_;
  std::vector<Tiled> tiled_;     // by shard, with our kernels
  Tensor partial_, non_finite_;  // work space of squared_norm; flag, int32 [1]
  Tensor void_;                  // fp64 without dims, 0 or 1
  Tensor windows_2W_;            // fp64: losses, norms; value i of all at i % W
};

// Squares of the counted elements and whether one of all is not finite (0 or 1), fp64 [2], by ATen.
[[nodiscard]] Tensor sum_squares_by_aten(std::span<const parallel::Shard> shards,
                                         at::Device device);

}  // namespace capstan::optim
