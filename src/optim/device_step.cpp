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
  numbers.loss_scale = field(numbers.bytes, offsetof(State, loss_scale), at::kDouble);
  numbers.good_steps = field(numbers.bytes, offsetof(State, good_steps), at::kLong);
  numbers.taken = field(numbers.bytes, offsetof(State, taken), at::kLong);
  return numbers;
}

DeviceStep::DeviceStep(const std::vector<parallel::Shard>& shards, at::Device device,
                       const DeviceStepOptions& options)
    : shards_(shards),
      options_(options),
      numbers_(make_step_numbers(device)),
      non_finite_(at::zeros({1}, at::TensorOptions().device(device).dtype(at::kInt))),
      void_(at::zeros({}, at::TensorOptions().device(device).dtype(at::kDouble))) {
  if (options_.spikes.sigma) windows_2W_ = at::zeros({2, options_.spikes.window}, void_.options());
  restore({.loss_scale = options_.loss_scale.start});
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

void DeviceStep::restore(const DecisionState& state) {
  const kernels::StepState made{.count = state.count,
                                .loss_scale = state.loss_scale,
                                .good_steps = state.good_steps,
                                .taken = static_cast<int64_t>(state.losses.size())};
  numbers_.bytes.copy_(to_device(&made, sizeof made));
  if (!windows_2W_.defined() || state.losses.empty()) return;
  const auto known = static_cast<int64_t>(state.losses.size());
  CAPSTAN_CHECK(known <= windows_2W_.size(1) && state.norms.size() == state.losses.size(),
                "windows of {} losses and {} norms, room for {}", known, state.norms.size(),
                windows_2W_.size(1));
  int64_t row = 0;
  for (const auto* values : {&state.losses, &state.norms})
    windows_2W_[row++]
        .narrow(0, 0, known)
        .copy_(to_device(values->data(), values->size() * sizeof(double)).view(at::kDouble));
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
  numbers_.gradient_scale.fill_(1.0 / options_.loss_scale.start);
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
  const kernels::Api* const api = ops::device_kernels();
  if (!api) return decide_by_aten(sums);
  const LossScaleOptions& scale = options_.loss_scale;
  kernels::DecideStepArgs args{
      .sums = static_cast<const kernels::StepSums*>(sums.const_data_ptr()),
      .is_void = void_.const_data_ptr<double>(),
      .max_norm = options_.max_norm,
      .loss_scale = {.interval = scale.dynamic ? scale.interval : 0,
                     .growth = scale.growth,
                     .backoff = scale.backoff,
                     .smallest = scale.smallest,
                     .largest = scale.largest},
      .state = static_cast<kernels::StepState*>(numbers_.bytes.mutable_data_ptr())};
  if (windows_2W_.defined()) {
    args.spikes = {.sigma = *options_.spikes.sigma, .window = windows_2W_.size(1)};
    args.windows = windows_2W_.mutable_data_ptr<double>();
  }
  api->decide_step(args, stream_of_now());
}

void DeviceStep::decide_by_aten(const Tensor& sums) {
  using S = DeviceSums;
  const Tensor loss = sums[S::kLoss];
  const Tensor norm = sums[S::kSquares].sqrt().div(numbers_.loss_scale);
  const Tensor is_finite = loss.isfinite().logical_and(norm.isfinite());
  const Tensor flags = sums[S::kNonFiniteLoss] + sums[S::kNonFiniteGradient];
  const Tensor broken = is_finite.logical_not().logical_or(flags.gt(0));
  numbers_.norm.copy_(norm);
  const Tensor clip = options_.max_norm > 0
                          ? norm.add(1e-6).reciprocal().mul(options_.max_norm).clamp_max(1.0)
                          : at::ones_like(norm);
  numbers_.gradient_scale.copy_(clip.div(numbers_.loss_scale));
  Tensor skips = broken.logical_or(void_.ne(0));
  if (windows_2W_.defined())
    skips = skips.logical_or(take_into_windows(at::stack({loss, norm}), skips.logical_not()));
  numbers_.skip.copy_(skips);
  numbers_.count.add_(skips.logical_not().to(at::kLong));
  if (options_.loss_scale.dynamic) rescale(broken);
}

// Whether one of (loss, norm) is a spike; where `counts`, they enter the windows.
Tensor DeviceStep::take_into_windows(const Tensor& values_2, const Tensor& counts) {
  const int64_t W = windows_2W_.size(1);
  const Tensor place_W = at::arange(W, numbers_.taken.options());
  const Tensor known = numbers_.taken.clamp_max(W);
  const Tensor is_known_W = place_W.lt(known);
  const auto sum_known = [&](const Tensor& x_2W) {
    return at::where(is_known_W, x_2W, 0.0).sum(1, /*keepdim=*/true);
  };
  const Tensor mean_21 = sum_known(windows_2W_).div(known);
  const Tensor deviation_21 = sum_known(windows_2W_.sub(mean_21).square()).div(known.sub(1)).sqrt();
  const Tensor least_21 = mean_21.abs().clamp_min(1.0).mul(1e-6);
  const Tensor limit_2 =
      mean_21.add(at::maximum(deviation_21, least_21), *options_.spikes.sigma).squeeze(1);
  const Tensor judges = known.ge(std::max<int64_t>(2, W / 2));
  const Tensor taken_2 = at::where(judges, at::minimum(values_2, limit_2), values_2);
  const Tensor is_spike = judges.logical_and(values_2.gt(limit_2).any());
  const Tensor enters_W = place_W.eq(numbers_.taken.remainder(W)).logical_and(counts);
  windows_2W_.copy_(at::where(enters_W, taken_2.unsqueeze(1), windows_2W_));
  numbers_.taken.add_(counts.to(at::kLong));
  return is_spike;
}

void DeviceStep::rescale(const Tensor& broken) {
  const LossScaleOptions& rule = options_.loss_scale;
  const Tensor scale = numbers_.loss_scale, good_steps = numbers_.good_steps.add(1);
  const Tensor grows = good_steps.ge(rule.interval);
  const Tensor of_good = at::where(grows, scale.mul(rule.growth).clamp_max(rule.largest), scale);
  scale.copy_(at::where(broken, scale.mul(rule.backoff).clamp_min(rule.smallest), of_good));
  numbers_.good_steps.copy_(at::where(broken.logical_or(grows), 0, good_steps));
}

}  // namespace capstan::optim
