// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "capstan/plan/plan.h"

namespace capstan::plan {

[[nodiscard]] std::string describe_ranks(const Plan& plan);

}  // namespace capstan::plan
