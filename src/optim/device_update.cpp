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
         : x.scalar_type() == at::kByte  ? DType::kUint8
                                         : DType::kBf16;
}

template <class T>
T* data_of(const at::Tensor& x) {
  return x.defined() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// The kernels round to bf16 on the way; other copies are made behind them.
void* copy_of(const FlatTensors& t) {
  return t.copy.defined() && t.copy.scalar_type() == at::kBFloat16 ? t.copy.mutable_data_ptr()
                                                                   : nullptr;
}

bool has_blocks(const FlatTensors& t) { return t.first.scalar_type() == at::kByte; }

kernels::Stream current_stream() {
  return static_cast<kernels::Stream>(device::accelerator()->current_stream().handle);
}

}  // namespace

bool DeviceUpdate::fits(std::span<const FlatJob> jobs) {
  return ops::device_kernels() && std::all_of(jobs.begin(), jobs.end(), [](const FlatJob& job) {
           return !job.tensors->weights.is_cpu();
         });
}

DeviceUpdate::DeviceUpdate(UpdateRule rule, std::span<const FlatJob> jobs) : rule_(rule) {
  for (const FlatJob& job : jobs) {
    if (pieces_.empty() || pieces_.back().tensors != job.tensors)
      pieces_.push_back({.tensors = job.tensors, .ranges = {}, .tiles = {}});
    pieces_.back().ranges.push_back(
        {job.begin, job.end, job.decay ? kernels::kDecay : 0, job.index});
  }
  for (Piece& piece : pieces_) {
    const std::vector<kernels::Tile> tiles = ops::device_kernels()->cut_tiles(piece.ranges);
    piece.count = static_cast<int64_t>(tiles.size());
    piece.tiles = to_device(tiles.data(), tiles.size() * sizeof(kernels::Tile));
    if (has_blocks(*piece.tensors) && !codes_.defined())
      codes_ = to_device(&kernels::kMomentCodes, sizeof(kernels::MomentCodes));
  }
}

void DeviceUpdate::step(const FlatStep& step) const {
  const kernels::StepState numbers{
      .lr = step.lr, .gradient_scale = step.gradient_scale, .count = step.count};
  step_by(step, to_device(&numbers, sizeof numbers));
}

void DeviceUpdate::step_by(const FlatStep& step, const at::Tensor& state) const {
  for (const Piece& piece : pieces_) {
    const FlatTensors& t = *piece.tensors;
    has_blocks(t) ? update_blocks(piece, step, state) : update(piece, step, state);
    if (t.copy.defined() && !copy_of(t)) t.copy.copy_(t.weights);
  }
}

void DeviceUpdate::update(const Piece& piece, const FlatStep& step, const at::Tensor& state) const {
  const FlatTensors& t = *piece.tensors;
  const auto* const api = ops::device_kernels();
  const auto launch = rule_ == UpdateRule::kAdamW  ? api->adamw
                      : rule_ == UpdateRule::kLion ? api->lion
                                                   : api->sophia;
  launch({.types = {dtype_of(t.weights), dtype_of(t.gradient), dtype_of(t.first)},
          .beta1 = step.beta1,
          .beta2 = step.beta2,
          .eps = step.eps,
          .weight_decay = step.weight_decay,
          .rho = step.rho,
          .seed = step.seed,
          .state = data_of<const kernels::StepState>(state),
          .tiles = data_of<const kernels::Tile>(piece.tiles),
          .tile_count = piece.count,
          .weights = t.weights.mutable_data_ptr(),
          .gradient = t.gradient.const_data_ptr(),
          .first = t.first.mutable_data_ptr(),
          .second = data_of<void>(t.second),
          .copy = copy_of(t)},
         current_stream());
}

void DeviceUpdate::update_blocks(const Piece& piece, const FlatStep& step,
                                 const at::Tensor& state) const {
  const FlatTensors& t = *piece.tensors;
  const auto* const api = ops::device_kernels();
  const auto launch = rule_ == UpdateRule::kAdamW  ? api->adamw_blockwise
                      : rule_ == UpdateRule::kLion ? api->lion_blockwise
                                                   : api->sophia_blockwise;
  launch({.gradient = dtype_of(t.gradient),
          .beta1 = step.beta1,
          .beta2 = step.beta2,
          .eps = step.eps,
          .weight_decay = step.weight_decay,
          .rho = step.rho,
          .state = data_of<const kernels::StepState>(state),
          .tiles = data_of<const kernels::Tile>(piece.tiles),
          .tile_count = piece.count,
          .codes = data_of<const kernels::MomentCodes>(codes_),
          .weights = t.weights.mutable_data_ptr(),
          .gradient_values = t.gradient.const_data_ptr(),
          .first = data_of<uint8_t>(t.first),
          .second = data_of<uint8_t>(t.second),
          .first_scale = data_of<float>(t.first_scale),
          .second_scale = data_of<float>(t.second_scale),
          .copy = copy_of(t)},
         current_stream());
}

void DeviceUpdate::observe(const CurvatureStep& step) const {
  const kernels::StepState numbers{.count = step.count};
  observe_by(step, to_device(&numbers, sizeof numbers));
}

void DeviceUpdate::observe_by(const CurvatureStep& step, const at::Tensor& state) const {
  for (const Piece& piece : pieces_) {
    const FlatTensors& t = *piece.tensors;
    ops::device_kernels()->sophia_curvature(
        {.types = {dtype_of(t.weights), dtype_of(t.gradient), dtype_of(t.second)},
         .beta2 = step.beta2,
         .tokens = step.tokens,
         .gradient_scale = step.gradient_scale,
         .seed = step.seed,
         .state = data_of<const kernels::StepState>(state),
         .tiles = data_of<const kernels::Tile>(piece.tiles),
         .tile_count = piece.count,
         .gradient = t.gradient.const_data_ptr(),
         .curvature = t.second.mutable_data_ptr(),
         .codes = data_of<const kernels::MomentCodes>(codes_),
         .curvature_scale = data_of<float>(t.second_scale)},
        current_stream());
  }
}

}  // namespace capstan::optim
