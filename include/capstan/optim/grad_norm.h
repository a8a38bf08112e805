// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The global gradient norm: each parameter once, squares summed in fp64 in an order that does not
// depend on the thread count or the instruction set.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "capstan/parallel/shard.h"

namespace capstan::optim {

struct SquareSums {
  double counted = 0;     // of the elements that this rank counts; summed over all ranks: norm^2
  bool is_finite = true;  // all elements that this rank holds, counted or not
};
[[nodiscard]] SquareSums sum_of_squares(std::span<const parallel::Shard> shards);
// The same in two halves, where gradients are there one after the other: partial sums of one shard
// on the CPU, and the sum over shards in order, which has the bits of sum_of_squares.
struct SquareParts {
  std::vector<double> sums;
  std::vector<bool> counted;
};
[[nodiscard]] SquareParts parts_of_squares(const parallel::Shard& shard);
[[nodiscard]] SquareSums add_up(std::span<const SquareParts> shards);
// Of one contiguous tensor: fp64, fp32 or bf16, on the CPU.
[[nodiscard]] double sum_of_squares(const at::Tensor& values);

// min(1, max_norm / (norm + 1e-6)).
[[nodiscard]] double clip_factor(double norm, double max_norm);

}  // namespace capstan::optim
