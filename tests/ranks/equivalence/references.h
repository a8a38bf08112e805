// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the tests of layouts on devices share, on a fake one and on GPUs: one-rank runs by model,
// and the report of a comparison.
#pragma once
#include <map>
#include <string>

#include "ranks/equivalence/equivalence.h"

namespace capstan::test {

inline constexpr int kDeviceSteps = 3;
inline constexpr double kDeviceBar = 1e-9;

// The run of one rank, made when its model is first asked for, where ops run then.
class References {
 public:
  [[nodiscard]] const ReferenceRun& of(const LayoutCase& layout);

 private:
  std::map<std::string, ReferenceRun> runs_;
};
// Another choice of experts or sign would be as right.
[[nodiscard]] bool is_on_edge(const ReferenceRun& reference);

// What is wrong and how to see it again; empty within the bar.
[[nodiscard]] std::string complaint_of(const LayoutCase& layout, const Comparison& result);

}  // namespace capstan::test
