// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Batches of the data module as micro-batches of the engine.
#pragma once
#include <vector>

#include "capstan/data/loader.h"
#include "capstan/engine/engine.h"

namespace capstan::trainer {

// Samples [first, first + count) of a batch. Row maps carry positions and document starts under
// `documents: separate`.
[[nodiscard]] engine::MicroBatch make_micro_batch(const data::SampleBatch& batch, int64_t first,
                                                  int64_t count, data::Documents documents);
// The whole batch in pieces of `micro_samples`.
[[nodiscard]] std::vector<engine::MicroBatch> split_batch(const data::SampleBatch& batch,
                                                          int64_t micro_samples,
                                                          data::Documents documents);

}  // namespace capstan::trainer
