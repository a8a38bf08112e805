// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW by our kernel on the accelerator: shards are cut into tiles once, the numbers of a step go
// to the device without the host waiting for it.
#pragma once
#include <span>
#include <vector>

#include "capstan/kernels/optimizer.h"
#include "capstan/optim/adamw.h"

namespace capstan::optim {

class DeviceUpdate {
 public:
  // The kernel knows these tensors: all on the accelerator, copies in bf16.
  [[nodiscard]] static bool fits(std::span<const AdamWJob> jobs);
  explicit DeviceUpdate(std::span<const AdamWJob> jobs);
  void step(const AdamWStep& step) const;
  // By a kernels::StepState that is in device memory already; of `step` betas, eps and decay count.
  void step_by(const AdamWStep& step, const at::Tensor& on_device) const;

 private:
  struct Piece {
    const AdamWTensors* tensors;
    std::vector<kernels::FlatRange> ranges;
    at::Tensor tiles;  // kernels::Tile, as bytes
    int64_t count = 0;
  };
  std::vector<Piece> pieces_;
};

}  // namespace capstan::optim
