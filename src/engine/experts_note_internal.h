// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How experts are multiplied in a run, said once at the start.
#pragma once
#include "capstan/ops/grouped_choice.h"
#include "capstan/plan/plan.h"

namespace capstan::engine {

// Of the plan's experts on this rank's device; the plan has some.
[[nodiscard]] ops::GroupedCase experts_case(const plan::Plan& plan, at::Device device);
void log_experts(const plan::Plan& plan, at::Device device);

}  // namespace capstan::engine
