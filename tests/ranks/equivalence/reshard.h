// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A checkpoint of one layout goes on under another, and the run is that of one rank.
#pragma once
#include <filesystem>
#include <random>
#include <string>

#include "ranks/equivalence/equivalence.h"

namespace capstan::test {

struct SavedRun {
  engine::EngineScalars scalars;
  std::string hash;  // of the weights
};

// A layout of the same model on at most `most_ranks`.
[[nodiscard]] LayoutCase draw_like(std::mt19937_64& random, const LayoutCase& model,
                                   int most_ranks);
// Two steps, then a checkpoint.
[[nodiscard]] SavedRun train_and_save(const LayoutCase& layout,
                                      const std::filesystem::path& directory,
                                      const RankRunner& runner = {});
// Goes on until the reference ends. Expects the saved weights, its losses and state, and that every
// rank reads no more than it holds.
void load_and_go_on(const LayoutCase& layout, const std::filesystem::path& directory,
                    const SavedRun& saved, const ReferenceRun& reference,
                    const RankRunner& runner = {});

}  // namespace capstan::test
