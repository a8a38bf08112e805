// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Initial values of parameters: a function of (seed, model, name, global element index) and of
// nothing else, so that any layout starts from the same numbers.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "capstan/plan/layout.h"

namespace capstan::param {

// The values of `box` of the parameter, shape box.extent, on the CPU. dtype: fp64, fp32, bf16 or
// fp16; a value in a narrow dtype is the rounded fp32 value. Any box holds the numbers that the
// whole tensor has there. Uses the threads of LibTorch.
[[nodiscard]] at::Tensor init_values(const plan::ParamSpec& spec, const plan::Box& box,
                                     uint64_t seed, const std::string& model_name,
                                     at::ScalarType dtype = at::ScalarType::Float);

}  // namespace capstan::param
