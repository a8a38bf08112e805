// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW, Lion and Sophia by our kernels on the accelerator: shards are cut into tiles once, the
// numbers of a step go to the device without the host waiting for it.
#pragma once
#include <span>
#include <vector>

#include "capstan/kernels/optimizer.h"
#include "capstan/optim/flat_update.h"

namespace capstan::optim {

class DeviceUpdate {
 public:
  // Our kernels are there and all tensors on the accelerator.
  [[nodiscard]] static bool fits(std::span<const FlatJob> jobs);
  DeviceUpdate(UpdateRule rule, std::span<const FlatJob> jobs);
  void step(const FlatStep& step) const;
  // By a kernels::StepState that is in device memory already; lr, scale and count of `step` are not
  // read.
  void step_by(const FlatStep& step, const at::Tensor& state) const;
  // Sophia's curvature; likewise with the count.
  void observe(const CurvatureStep& step) const;
  void observe_by(const CurvatureStep& step, const at::Tensor& state) const;

 private:
  struct Piece {
    const FlatTensors* tensors;
    std::vector<kernels::FlatRange> ranges;
    at::Tensor tiles;  // kernels::Tile, as bytes
    int64_t count = 0;
  };
  void update(const Piece& piece, const FlatStep& step, const at::Tensor& state) const;
  void update_blocks(const Piece& piece, const FlatStep& step, const at::Tensor& state) const;

  UpdateRule rule_;
  std::vector<Piece> pieces_;
  at::Tensor codes_;  // kernels::MomentCodes, as bytes; 8-bit moments only
};

}  // namespace capstan::optim
