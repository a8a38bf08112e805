// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <map>
#include <string>
#include <vector>

#include "capstan/plan/plan.h"

namespace capstan::plan {

// What one rank holds, needs, computes and sends in a training step.
struct RankReport {
  int rank = 0;
  Coord coord;
  std::vector<int> blocks;
  int64_t parameters = 0;  // elements of this rank's values, cut over the tensor axis only
  double flops = 0;        // 3 x forward
  double flops_again = 0;  // of forwards that are run again
  MemoryReport memory;
  Traffic traffic;
};
// The first rank of each pipeline rank; the others of it differ by padding only.
[[nodiscard]] std::vector<RankReport> report_ranks(const Plan& plan);
// Bytes by axis, over all operations.
[[nodiscard]] std::map<std::string, int64_t> bytes_by_axis(const Traffic& traffic);

}  // namespace capstan::plan
