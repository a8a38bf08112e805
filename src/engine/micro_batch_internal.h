// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Checks of what the caller hands in as data.
#pragma once
#include <cstdint>
#include <vector>

#include "capstan/engine/engine.h"

namespace capstan::engine {

inline constexpr int64_t kIgnoredTarget = -100;

[[nodiscard]] int64_t count_targets(const Tensor& targets_BT);
[[nodiscard]] int64_t count_targets(const std::vector<MicroBatch>& batches);
// Throw ConfigError saying which micro-batch does not fit the plan, and how.
void check_batches(const std::vector<MicroBatch>& batches, const plan::BatchPlan& plan);
void check_batch(const MicroBatch& batch);

}  // namespace capstan::engine
