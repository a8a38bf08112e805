// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Saving a step so that a crash at any point leaves either the whole step or none. No torch:
// tensors are bytes. Protocol: every rank writes its shards into step-N.partial/<uuid>/, rank 0
// describes them in manifest.json, all agree, rank 0 renames the folder to step-N without
// replacing, then updates the `latest` hint and removes old steps.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "capstan/base/file.h"
#include "capstan/checkpoint/manifest.h"

namespace capstan::checkpoint {

// All ranks give a text and get everybody's, by rank. Implemented over a communicator, and by
// threads in tests. Collective over: world.
class CommitGroup {
 public:
  virtual ~CommitGroup() = default;
  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int size() const = 0;
  virtual std::vector<std::string> gather(const std::string& mine) = 0;
};

// The one-rank group.
class SoloGroup final : public CommitGroup {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::vector<std::string> gather(const std::string& mine) override { return {mine}; }
};

// A box of a tensor as bytes in row-major order of the box.
struct StateBlob {
  std::string model, kind, name;
  plan::Shape global_shape;
  plan::Box box;
  DType dtype = DType::kFp32;
  std::span<std::byte> bytes;  // saving reads, loading writes
  bool writes = true;
};

struct SaveRequest {
  Path directory;  // runs/x/checkpoints
  int64_t step = 0;
  std::vector<StateBlob> state;  // of this rank
  std::vector<std::pair<std::string, std::string>>
      files;  // read from rank 0: recipe.yaml, config.json, state.json, ...
  std::string recipe_identity;
  std::map<std::string, std::string> layout;
};
struct SaveResult {
  Path path;          // checkpoints/step-00000300
  int64_t bytes = 0;  // all ranks
};
// Throws on every rank when any rank failed; nothing committed before is touched. A step that is
// already committed is left as it is. Collective over: world.
SaveResult save_step(const SaveRequest& request, CommitGroup& group);

struct KeepRules {
  int64_t keep_last = 2;
  std::optional<int64_t> keep_every_steps;
};
// Removes committed steps that no rule keeps, and leftovers of unfinished saves. The newest
// committed step always stays. One rank calls it, after a commit.
void apply_retention(const Path& directory, const KeepRules& rules);

struct CommittedStep {
  int64_t step = 0;
  Path path;
};
[[nodiscard]] std::string step_folder_name(int64_t step);  // "step-00000300"
[[nodiscard]] std::optional<int64_t> step_of_folder(const std::string& name);
// Folders step-<n> that hold a manifest, newest first by number. Content is not verified.
[[nodiscard]] std::vector<CommittedStep> list_steps(const Path& directory);

}  // namespace capstan::checkpoint
