// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Verifying and loading committed steps, under any layout: boxes of what is stored are intersected
// with boxes of what a rank needs, and only those bytes are read. No torch.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "capstan/checkpoint/commit.h"
#include "capstan/checkpoint/manifest.h"

namespace capstan::checkpoint {

enum class Verify { kFull, kFast };  // hashes of all files | manifest and sizes
[[nodiscard]] Verify parse_verify(const std::string& name);

// Reads the manifest of a step folder and checks what it lists. Ranks share the work: each hashes
// every size-th file. Throws DataError naming file, got and need. Collective over: world when the
// group has more than one rank.
[[nodiscard]] Manifest verify_step(const Path& step_folder, Verify verify, CommitGroup& group);

// Newest step that passes; each rejection is logged with its reason. nullopt when no committed step
// exists; throws DataError when steps exist and none is good. Collective over: world.
struct FoundStep {
  Path path;
  Manifest manifest;
};
[[nodiscard]] std::optional<FoundStep> find_newest_good_step(const Path& directory, Verify verify,
                                                             CommitGroup& group);

// Fills every blob. Lists all that is missing, has another shape or dtype, or is not covered; then
// throws DataError (ConfigError when nothing matches at all: another model). `kinds` that the step
// lacks are reported unless optional. Returns the bytes read.
int64_t load_state(const FoundStep& step, std::vector<StateBlob>& state);

[[nodiscard]] std::string read_step_file(const Path& step_folder, const std::string& name);

// DIR of `--model`: a run directory (newest good step) or a step folder. Throws ConfigError saying
// what was looked for.
[[nodiscard]] FoundStep open_model_directory(const Path& directory, Verify verify);

}  // namespace capstan::checkpoint
