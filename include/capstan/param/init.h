// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Initial values of parameters: a function of (seed, model, name, global element index) and of
// nothing else, so that any layout starts from the same numbers.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "capstan/plan/layout.h"

namespace capstan::param {

// The values of `box` of the parameter, shape box.extent, on the CPU. dtype: fp64, fp32, bf16 or
// fp16; a value in a narrow dtype is the rounded fp32 value. Any box holds the numbers that the
// whole tensor has there. Uses the threads of LibTorch.
[[nodiscard]] at::Tensor init_values(const plan::ParamSpec& spec, const plan::Box& box,
                                     uint64_t seed, const std::string& model_name,
                                     at::ScalarType dtype = at::ScalarType::Float);

// Where the elements of a box lie in the global tensor: runs of `length` elements that begin
// `stride` apart, the first at `first`.
struct BoxRuns {
  int64_t first = 0, length = 1, stride = 1;
};
// Nothing when runs of the box are not equally far apart.
[[nodiscard]] std::optional<BoxRuns> equal_runs(const plan::Box& box, const plan::Shape& global);
// The random stream of a parameter's initial values.
[[nodiscard]] uint64_t init_stream(const std::string& model_name, const std::string& param_name);

}  // namespace capstan::param
