// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// precision.fp8: which weights it covers, what it costs in memory, where it can run. The products
// themselves are in ops/fp8_linear.h.
#pragma once
#include <span>
#include <vector>

#include "capstan/base/gpu.h"
#include "capstan/plan/plan.h"

namespace capstan::plan {

[[nodiscard]] bool uses_fp8(const recipe::Recipe& recipe);
// The matrices of the layers, in the order of the table; those kept wide are not multiplied in fp8
// but listed all the same.
[[nodiscard]] std::vector<const ParamSpec*> fp8_weights(const ModelShape& shape,
                                                        const std::vector<ParamSpec>& table);
// Casts of weights are kept until the next step, unless weights are gathered for each pass.
[[nodiscard]] bool keeps_fp8_weights(const recipe::Recipe& recipe);

// Of one rank: two casts of each weight, for as long as the run.
[[nodiscard]] int64_t fp8_kept_bytes(const Plan& plan, const RankLayout& layout);
// Adds what products hold beside their factors and result, to the workspace of a layer: casts of
// activations and gradients, on cpu their numbers in fp32 as well.
void add_fp8_work(ActivationBytes& bytes, const Plan& plan);
// The most that the product of a weight gradient holds of that.
[[nodiscard]] int64_t fp8_work_bytes(const Plan& plan);

// Throws ConfigError naming the first GPU below compute capability 9.0.
void check_fp8_gpus(const recipe::Recipe& recipe, std::span<const Gpu> gpus);

}  // namespace capstan::plan
