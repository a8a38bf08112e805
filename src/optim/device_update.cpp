// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "optim/device_update_internal.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "optim/to_device_internal.h"

namespace capstan::optim {
namespace {

DType dtype_of(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble  ? DType::kFp64
         : x.scalar_type() == at::kFloat ? DType::kFp32
                                         : DType::kBf16;
}

}  // namespace

bool DeviceUpdate::fits(std::span<const AdamWJob> jobs) {
  return ops::device_kernels() && std::all_of(jobs.begin(), jobs.end(), [](const AdamWJob& job) {
           const AdamWTensors& t = *job.tensors;
           return !t.weights.is_cpu() &&
                  (!t.copy.defined() || t.copy.scalar_type() == at::kBFloat16);
         });
}

DeviceUpdate::DeviceUpdate(std::span<const AdamWJob> jobs) {
  for (const AdamWJob& job : jobs) {
    if (pieces_.empty() || pieces_.back().tensors != job.tensors)
      pieces_.push_back({.tensors = job.tensors, .ranges = {}, .tiles = {}});
    pieces_.back().ranges.push_back({job.begin, job.end, job.decay ? kernels::kDecay : 0});
  }
  for (Piece& piece : pieces_) {
    const std::vector<kernels::Tile> tiles = ops::device_kernels()->cut_tiles(piece.ranges);
    piece.count = static_cast<int64_t>(tiles.size());
    piece.tiles = to_device(tiles.data(), tiles.size() * sizeof(kernels::Tile));
  }
}

void DeviceUpdate::step(const AdamWStep& step) const {
  const kernels::StepState state{
      .lr = step.lr, .gradient_scale = step.gradient_scale, .count = step.count};
  const at::Tensor on_device = to_device(&state, sizeof state);
  step_by(step, on_device);
}

void DeviceUpdate::step_by(const AdamWStep& step, const at::Tensor& on_device) const {
  const auto stream = static_cast<kernels::Stream>(device::accelerator()->current_stream().handle);
  for (const Piece& piece : pieces_) {
    const AdamWTensors& t = *piece.tensors;
    ops::device_kernels()->adamw(
        {.types = {dtype_of(t.weights), dtype_of(t.gradient), dtype_of(t.first)},
         .beta1 = step.beta1,
         .beta2 = step.beta2,
         .eps = step.eps,
         .weight_decay = step.weight_decay,
         .state = static_cast<const kernels::StepState*>(on_device.const_data_ptr()),
         .tiles = static_cast<const kernels::Tile*>(piece.tiles.const_data_ptr()),
         .tile_count = piece.count,
         .weights = t.weights.mutable_data_ptr(),
         .gradient = t.gradient.const_data_ptr(),
         .first = t.first.mutable_data_ptr(),
         .second = t.second.mutable_data_ptr(),
         .copy = t.copy.defined() ? t.copy.mutable_data_ptr() : nullptr},
        stream);
  }
}

}  // namespace capstan::optim
