// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Parts of prove(): the plan of the whole recipe, and rows drawn from a seed.
#pragma once
#include "capstan/data/loader.h"
#include "capstan/trainer/prove.h"

namespace capstan::trainer {

// Memory of this machine is no limit: the whole run is not started.
[[nodiscard]] plan::Plan plan_whole_run(const ProveOptions& options);

struct DrawnRows {
  int64_t first = 0, samples = 0;  // global sample numbers
  int64_t length = 0, vocab = 0;
  data::Documents documents = data::Documents::kJoined;
  uint64_t seed = 0;
};
// What a sample holds depends on its number and the seed alone. Targets are ignored unevenly: one
// of eight samples has none, every third has few. Separate documents start at drawn places, of
// which some samples have many and some hardly any.
[[nodiscard]] data::SampleBatch draw_rows(const DrawnRows& rows);

}  // namespace capstan::trainer
