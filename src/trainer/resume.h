// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Whether and from where a run goes on, and whether it is still the same run.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "capstan/checkpoint/load.h"
#include "capstan/data/loader.h"
#include "capstan/engine/engine.h"
#include "capstan/recipe/load.h"

namespace capstan::trainer {

struct ResumePoint {
  checkpoint::FoundStep step;
  recipe::Recipe recipe;  // as it was trained, every auto fixed
  engine::EngineScalars scalars;
  std::string data_fingerprint;  // DataFingerprint::text()
};

// By `--resume`: auto, none or a step folder. nullopt = start anew. Throws ConfigError when the
// directory is not as asked. Collective over: world.
[[nodiscard]] std::optional<ResumePoint> find_resume_point(const Path& run_directory,
                                                           const std::string& resume,
                                                           checkpoint::Verify verify,
                                                           checkpoint::CommitGroup& group);

// `auto` values stay what they were fixed to at the first start.
void adopt_fixed_values(recipe::Recipe& recipe, const recipe::Recipe& stored);

// Throws ConfigError with every difference that may not change and is not allowed by name; logs
// those that are.
void check_same_run(const ResumePoint& point, const recipe::Recipe& now,
                    const data::DataFingerprint& data, const std::vector<std::string>& allowed);

// state.json of a checkpoint.
[[nodiscard]] std::string state_text(const engine::EngineScalars& scalars,
                                     const data::DataFingerprint& data);

}  // namespace capstan::trainer
