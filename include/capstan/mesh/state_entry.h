// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// StateEntry: one box of one named tensor that this rank holds. What engine and trainer hand to
// checkpoint, and all that checkpoint knows of the run.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

#include "capstan/plan/layout.h"

namespace capstan::mesh {

struct StateEntry {
  std::string model;  // "policy"
  std::string kind;   // "model" (master weights), "optimizer.exp_avg", "optimizer.exp_avg_sq", ...
                      // Scales of 8-bit states have a value per 256 elements of the last dimension.
  std::string name;   // canonical parameter name
  plan::Shape global_shape;
  plan::Box box;  // where the elements of `tensor` lie in the global tensor
  at::Tensor
      tensor;  // 1-d contiguous view of the live storage, box.numel() elements; loads write into it
  bool writes = true;  // of all ranks that hold this box exactly one writes it
};

}  // namespace capstan::mesh
