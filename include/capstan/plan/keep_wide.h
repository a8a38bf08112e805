// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which parameters keep the master's type in what ops read (precision.keep_fp32): norms and routers
// of a bf16 run, whose small updates bf16 would round away. An op with such a parameter works in
// its type and gives the compute type. Changes nothing where the types are equal.
#pragma once
#include <string>
#include <vector>

#include "capstan/plan/family.h"
#include "capstan/plan/param_patterns.h"

namespace capstan::plan {

[[nodiscard]] std::vector<ParamSpec> keep_wide(std::vector<ParamSpec> table,
                                               const std::vector<std::string>& patterns);
[[nodiscard]] std::vector<TornUnit> wide_apart(const std::vector<ParamSpec>& table);

}  // namespace capstan::plan
