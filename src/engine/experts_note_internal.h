// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How experts are multiplied in a run, said once at the start.
#pragma once
#include <string>

#include "capstan/ops/grouped_choice.h"
#include "capstan/plan/plan.h"

namespace capstan::engine {

// Of the plan's experts on this rank's device; the plan has some.
[[nodiscard]] ops::GroupedCase experts_case(const plan::Plan& plan, at::Device device);
// Whether the host has to know how many rows travel between ranks.
[[nodiscard]] bool counts_travellers(const plan::Plan& plan);
// How weight gradients of 16-bit activations are summed.
[[nodiscard]] std::string gradients_text(const ops::GroupedChoice& choice);
void log_experts(const plan::Plan& plan, at::Device device);

}  // namespace capstan::engine
