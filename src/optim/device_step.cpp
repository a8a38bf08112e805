// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/device_step.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "capstan/base/check.h"
#include "capstan/device/accelerator.h"
#include "capstan/kernels/optimizer.h"
#include "capstan/ops/device_kernels.h"
#include "optim/to_device_internal.h"

namespace capstan::optim {
namespace {

// A field of the struct as a tensor without dims over the same memory.
Tensor field(const Tensor& bytes, size_t offset, at::ScalarType type) {
  const auto size = static_cast<int64_t>(c10::elementSize(type));
  return bytes.narrow(0, static_cast<int64_t>(offset), size).view(type).squeeze(0);
}

kernels::Stream stream_of_now() {
  return static_cast<kernels::Stream>(device::accelerator()->current_stream().handle);
}

DType dtype_of(const Tensor& x) {
  return x.scalar_type() == at::kDouble     ? DType::kFp64
         : x.scalar_type() == at::kFloat    ? DType::kFp32
         : x.scalar_type() == at::kBFloat16 ? DType::kBf16
                                            : DType::kFp16;
}

}  // namespace

Tensor to_device(const void* bytes, size_t count) {
  device::Accelerator& accelerator = *device::accelerator();
  const Tensor pinned = accelerator.empty_pinned({static_cast<int64_t>(count)}, at::kByte);
  std::memcpy(pinned.mutable_data_ptr(), bytes, count);
  return pinned.to(accelerator.device(), at::kByte, /*non_blocking=*/true);
}

StepNumbers make_step_numbers(at::Device device) {
  using State = kernels::StepState;
  static_assert(sizeof(State) % sizeof(double) == 0);
  StepNumbers numbers;
  numbers.bytes = at::zeros({static_cast<int64_t>(sizeof(State))},
                            at::TensorOptions().device(device).dtype(at::kByte));
  numbers.lr = field(numbers.bytes, offsetof(State, lr), at::kDouble);
  numbers.gradient_scale = field(numbers.bytes, offsetof(State, gradient_scale), at::kDouble);
  numbers.norm = field(numbers.bytes, offsetof(State, norm), at::kDouble);
  numbers.count = field(numbers.bytes, offsetof(State, count), at::kLong);
  numbers.skip = field(numbers.bytes, offsetof(State, skip), at::kInt);
  return numbers;
}

DeviceStep::DeviceStep(const std::vector<parallel::Shard>& shards, at::Device device,
                       const DeviceStepOptions& options)
    : shards_(shards),
      options_(options),
      numbers_(make_step_numbers(device)),
      non_finite_(at::zeros({1}, at::TensorOptions().device(device).dtype(at::kInt))),
      void_(at::zeros({}, at::TensorOptions().device(device).dtype(at::kDouble))) {
  if (ops::device_kernels()) cut_tiles(shards);
}

void DeviceStep::cut_tiles(const std::vector<parallel::Shard>& shards) {
  int64_t most = 0;
  for (const parallel::Shard& shard : shards) {
    std::vector<kernels::FlatRange> ranges;
    for (const parallel::ShardRange& range : shard.ranges)
      ranges.push_back({range.begin, range.end, range.counted ? kernels::kCounted : 0});
    const std::vector<kernels::Tile> tiles = ops::device_kernels()->cut_tiles(ranges);
    tiled_.push_back({shard.gradient, {}, static_cast<int64_t>(tiles.size())});
    if (tiles.empty()) continue;
    tiled_.back().tiles = to_device(tiles.data(), tiles.size() * sizeof(kernels::Tile));
    most = std::max(most, tiled_.back().count);
  }
  partial_ = at::empty({most}, non_finite_.options().dtype(at::kDouble));
}

void DeviceStep::set_step(double lr, bool is_void) {
  const Tensor pinned = device::accelerator()->empty_pinned({2}, at::kDouble);
  pinned.mutable_data_ptr<double>()[0] = lr;
  pinned.mutable_data_ptr<double>()[1] = is_void ? 1 : 0;
  numbers_.lr.copy_(pinned[0], /*non_blocking=*/true);
  void_.copy_(pinned[1], /*non_blocking=*/true);
}

void DeviceStep::set_count(int64_t count) {
  const Tensor pinned = device::accelerator()->empty_pinned({}, at::kLong);
  *pinned.mutable_data_ptr<int64_t>() = count;
  numbers_.count.copy_(pinned, /*non_blocking=*/true);
}

Tensor sum_squares_by_aten(std::span<const parallel::Shard> shards, at::Device device) {
  std::vector<Tensor> norms, counted;
  for (const parallel::Shard& shard : shards) {
    if (!shard.gradient.defined()) continue;
    for (const parallel::ShardRange& range : shard.ranges) {
      const Tensor part = shard.gradient.narrow(0, range.begin, range.end - range.begin);
      norms.push_back(at::linalg_vector_norm(part, 2, {}, false, at::kDouble));
      if (range.counted) counted.push_back(norms.back());
    }
  }
  const Tensor sums = at::zeros({2}, at::TensorOptions().device(device).dtype(at::kDouble));
  if (!counted.empty()) sums[0].copy_(at::stack(counted).square().sum());
  if (!norms.empty()) sums[1].copy_(at::stack(norms).isfinite().logical_not().any());
  return sums;
}

void DeviceStep::sum_squares(const Tensor& sums) {
  const Tensor squares = sums[DeviceSums::kSquares], flag = sums[DeviceSums::kNonFiniteGradient];
  if (!ops::device_kernels()) {
    const Tensor made = sum_squares_by_aten(shards_, sums.device());
    squares.copy_(made[0]);
    flag.copy_(made[1]);
    return;
  }
  non_finite_.zero_();
  squares.zero_();
  for (const Tiled& t : tiled_) square(t, squares);
  flag.copy_(non_finite_[0]);
}

void DeviceStep::square(const Tiled& t, const Tensor& squares) {
  if (t.count == 0) return;
  ops::device_kernels()->squared_norm(
      {.dtype = dtype_of(t.gradient),
       .values = t.gradient.const_data_ptr(),
       .tiles = static_cast<const kernels::Tile*>(t.tiles.const_data_ptr()),
       .tile_count = t.count,
       .partial = partial_.mutable_data_ptr<double>(),
       .sum = squares.mutable_data_ptr<double>(),
       .non_finite = non_finite_.mutable_data_ptr<int32_t>(),
       .add = true},
      stream_of_now());
}

void DeviceStep::open_updates() {
  numbers_.gradient_scale.fill_(1.0 / options_.loss_scale);
  numbers_.skip.copy_(void_);
  numbers_.count.add_(numbers_.skip.eq(0).to(at::kLong));
  non_finite_.zero_();
}

void DeviceStep::add_squares(size_t shard, const Tensor& sums) {
  const Tensor squares = sums[DeviceSums::kSquares], flag = sums[DeviceSums::kNonFiniteGradient];
  if (ops::device_kernels()) {
    square(tiled_.at(shard), squares);
    flag.copy_(non_finite_[0]);
    return;
  }
  const Tensor made = sum_squares_by_aten({&shards_.at(shard), 1}, sums.device());
  squares.add_(made[0]);
  flag.add_(made[1]);
}

void DeviceStep::close_updates() { numbers_.count.sub_(numbers_.skip.eq(0).to(at::kLong)); }

void DeviceStep::decide(const Tensor& sums) {
  using S = DeviceSums;
  const Tensor flags = sums[S::kNonFiniteLoss] + sums[S::kNonFiniteGradient] + void_;
  const Tensor broken = flags.gt(0).logical_or(sums[S::kLoss].isfinite().logical_not());
  non_finite_[0].copy_(broken);
  const double inverse = 1.0 / options_.loss_scale;
  const Tensor squares = sums[S::kSquares];
  if (const kernels::Api* const api = ops::device_kernels()) {
    api->decide_step({.sum = squares.const_data_ptr<double>(),
                      .non_finite = non_finite_.const_data_ptr<int32_t>(),
                      .max_norm = options_.max_norm,
                      .inverse_loss_scale = inverse,
                      .state = static_cast<kernels::StepState*>(numbers_.bytes.mutable_data_ptr())},
                     stream_of_now());
    return;
  }
  const Tensor norm = squares.sqrt().mul(inverse);
  numbers_.norm.copy_(norm);
  if (options_.max_norm > 0)
    numbers_.gradient_scale.copy_(
        norm.add(1e-6).reciprocal().mul(options_.max_norm).clamp_max(1.0).mul(inverse));
  else
    numbers_.gradient_scale.fill_(inverse);
  numbers_.skip.copy_(non_finite_[0].ne(0).logical_or(norm.isfinite().logical_not()));
  numbers_.count.add_(numbers_.skip.eq(0).to(at::kLong));
}

}  // namespace capstan::optim
