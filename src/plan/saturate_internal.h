// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Products of sizes that no machine has must come out too large, not wrapped around: recipes are
// untrusted.
#pragma once
#include <algorithm>
#include <cstdint>

#include "capstan/base/bytes.h"

namespace capstan::plan {

inline constexpr int64_t kSaturated = int64_t{1}
                                      << 56;  // a hundred of these still fit into 64 bits

[[nodiscard]] inline int64_t saturating_multiply(int64_t a, int64_t b) {
  return std::min(checked_multiply(a, b).value_or(kSaturated), kSaturated);
}

}  // namespace capstan::plan
