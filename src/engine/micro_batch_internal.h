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

// Ids and targets must be looked at before they are on a device, where ops do not read them.
void check_ids(const std::vector<MicroBatch>& batches, int64_t vocab_size);
// Whole rows with the starts of their documents.
[[nodiscard]] MicroBatch find_documents(const MicroBatch& rows);
[[nodiscard]] std::vector<MicroBatch> find_documents(const std::vector<MicroBatch>& rows);
// What blocks and head read of a micro-batch; the same tensors on the CPU.
[[nodiscard]] MicroBatch to_device(const MicroBatch& batch, at::Device device);
[[nodiscard]] std::vector<MicroBatch> to_device(const std::vector<MicroBatch>& batches,
                                                at::Device device);

[[nodiscard]] Tensor to_device(const Tensor& x, at::Device device);
[[nodiscard]] std::vector<Tensor> to_device(const std::vector<Tensor>& all, at::Device device);

// Numbers in (0, 1), one per token of a batch on the CPU: functions of (seed, step, sample, place
// in the row) and of nothing else. fp64 [B, T], a tensor per batch.
[[nodiscard]] std::vector<Tensor> uniform_numbers(const std::vector<MicroBatch>& batches,
                                                  uint64_t seed, int64_t step);

// The part of whole rows that rank `rank` of the context axis works on (parallel/context_split.h).
[[nodiscard]] MicroBatch cut_rows(const MicroBatch& rows, int ranks, int rank);
[[nodiscard]] std::vector<MicroBatch> cut_rows(const std::vector<MicroBatch>& rows, int ranks,
                                               int rank);

}  // namespace capstan::engine
