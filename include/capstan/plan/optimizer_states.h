// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What an optimizer keeps of every parameter beside the master weights. One table: memory,
// checkpoints, storage and update rules read it. With optimizer.moments int8 a parameter holds
// 8-bit states where its update kind is kRowBlock (mark_row_blocks), else those of `auto`.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "capstan/base/dtype.h"
#include "capstan/plan/family.h"
#include "capstan/recipe/numerics.h"

namespace capstan::plan {

// Elements of a parameter that share one scale of 8-bit states, side by side along its last
// dimension (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022).
inline constexpr int64_t kStateBlock = 256;

// One state tensor: a value for every `block` elements of the parameter along its last dimension.
struct StateSpec {
  std::string kind;  // "exp_avg"; "optimizer.exp_avg" in checkpoints
  DType dtype = DType::kFp32;
  int64_t block = 1;
};
// An optimizer that is not of this build (optim::register_optimizer) counts as one with two
// moments.
[[nodiscard]] std::vector<StateSpec> optimizer_states(const recipe::Optimizer& optimizer,
                                                      DType master, UpdateKind update);
// Of `elements` elements of a parameter in all its states.
[[nodiscard]] int64_t state_bytes(const std::vector<StateSpec>& states, int64_t elements);

// optimizer.moments int8: marks as kRowBlock the trainable parameters that get 8-bit states: of at
// least 4096 elements, outside of the embedding, with rows of whole blocks, and the same for all
// that share a product or are experts of one layer.
[[nodiscard]] std::vector<ParamSpec> mark_row_blocks(std::vector<ParamSpec> table,
                                                     const recipe::Optimizer& optimizer);

// Whether a state is rounded by random bits, which ask for the index of each element.
[[nodiscard]] bool rounds_by_index(const recipe::Optimizer& optimizer);

}  // namespace capstan::plan
