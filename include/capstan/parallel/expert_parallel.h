// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Expert layers of any layout: tokens are split over the tensor axis before they are routed, and
// travel to the ranks of their experts and back. docs/design/moe.md has the derivation.
#pragma once
#include <ATen/core/Tensor.h>

#include "capstan/comm/communicator.h"
#include "capstan/nn/experts.h"

namespace capstan::parallel {

using at::Tensor;

// Copies of the communicators keep their groups alive.
struct ExpertParallel {
  comm::Communicator expert;  // ep: experts e of rank r are r, r + 1, ... times count / ranks
  comm::Communicator tensor;  // tp
  comm::Communicator rows;    // cp x tp: the ranks that hold tokens of the same rows
  // Outside of column and row layers a rank of the tensor axis holds its tokens only (not while
  // decoding).
  bool sequence_parallel = false;
};

// nn::Seams::experts() of such a layout: x and the result are [B, T, D] of this rank's residual
// stream. Four exchanges over ep and, without sequence parallel, two gathers over tp per layer and
// micro-batch. Every rank takes part in all of them, whatever tokens it has. Collective over: ep,
// tp, cp.
[[nodiscard]] Tensor parallel_experts(const ExpertParallel& layout, const nn::Context& context,
                                      int layer, const Tensor& x_BTD, const nn::ExpertInput& input);

}  // namespace capstan::parallel
