// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/optim/grad_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "capstan/base/check.h"
#include "capstan/optim/device_step.h"
#include "optim/cpu/kernels.h"

namespace capstan::optim {
namespace {

constexpr int64_t kTaskElements = 16384;

struct Task {
  const at::Tensor* values;
  int64_t begin, end;
  bool counted;
};

void cut(std::vector<Task>& tasks, const at::Tensor& values, const parallel::ShardRange& range) {
  for (int64_t begin = range.begin; begin < range.end; begin += kTaskElements)
    tasks.push_back({&values, begin, std::min(range.end, begin + kTaskElements), range.counted});
}

double squares(const Task& task) {
  const auto& k = cpu::kernels();
  const int64_t count = task.end - task.begin;
  const void* data = task.values->const_data_ptr();
  switch (task.values->scalar_type()) {
    case at::kDouble:
      return k.squares_f64(static_cast<const double*>(data) + task.begin, count);
    case at::kFloat:
      return k.squares_f32(static_cast<const float*>(data) + task.begin, count);
    case at::kBFloat16:
      return k.squares_bf16(static_cast<const uint16_t*>(data) + task.begin, count);
    default:
      break;
  }
  CAPSTAN_CHECK(false, "norm of {} gradients", c10::toString(task.values->scalar_type()));
  return 0;
}

void cut(std::vector<Task>& tasks, const parallel::Shard& shard) {
  if (!shard.gradient.defined()) return;
  for (const parallel::ShardRange& range : shard.ranges) cut(tasks, shard.gradient, range);
}

// Partial sums of fixed ranges: the same bits for any number of threads.
SquareParts run(const std::vector<Task>& tasks) {
  SquareParts parts{std::vector<double>(tasks.size()), {}};
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts.sums[static_cast<size_t>(i)] = squares(tasks[static_cast<size_t>(i)]);
  });
  for (const Task& task : tasks) parts.counted.push_back(task.counted);
  return parts;
}

// Off the CPU: norms of ranges in fp64, read once.
SquareSums sum_by_aten(std::span<const parallel::Shard> shards, at::Device device) {
  const at::Tensor read = sum_squares_by_aten(shards, device).cpu();
  const double* const sums = read.const_data_ptr<double>();
  return {.counted = sums[0], .is_finite = sums[1] == 0};
}

// The gradients' device; the CPU's if there are none.
at::Device device_of(std::span<const parallel::Shard> shards) {
  for (const parallel::Shard& shard : shards)
    if (shard.gradient.defined()) return shard.gradient.device();
  return at::kCPU;
}

}  // namespace

SquareSums sum_of_squares(std::span<const parallel::Shard> shards) {
  if (const at::Device device = device_of(shards); !device.is_cpu())
    return sum_by_aten(shards, device);
  std::vector<Task> tasks;
  for (const parallel::Shard& shard : shards) cut(tasks, shard);
  const SquareParts parts = run(tasks);
  return add_up({&parts, 1});
}

SquareParts parts_of_squares(const parallel::Shard& shard) {
  std::vector<Task> tasks;
  cut(tasks, shard);
  return run(tasks);
}

SquareSums add_up(std::span<const SquareParts> shards) {
  SquareSums sums;
  for (const SquareParts& parts : shards) {
    for (size_t i = 0; i < parts.sums.size(); ++i) {
      sums.is_finite = sums.is_finite && std::isfinite(parts.sums[i]);
      if (parts.counted[i]) sums.counted += parts.sums[i];
    }
  }
  return sums;
}

double sum_of_squares(const at::Tensor& values) {
  CAPSTAN_CHECK(values.is_contiguous(), "norm of a strided tensor");
  std::vector<Task> tasks;
  cut(tasks, values, {.begin = 0, .end = values.numel()});
  const SquareParts parts = run(tasks);
  return add_up({&parts, 1}).counted;
}

double clip_factor(double norm, double max_norm) { return std::min(1.0, max_norm / (norm + 1e-6)); }

}  // namespace capstan::optim
