// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The run directory (docs/architecture.md): where a run keeps lock, recipe, metrics, logs and
// checkpoints. Only rank 0 writes to it, checkpoints and rank logs apart.
#pragma once
#include <memory>
#include <string>

#include "capstan/base/file.h"
#include "capstan/recipe/recipe.h"

namespace capstan::trainer {

[[nodiscard]] Path run_directory_of(const recipe::Recipe& recipe);  // run.directory, or runs/<name>
[[nodiscard]] Path attempt_folder(const Path& run_directory, int attempt);
// 1 + the highest attempt that has a folder in logs/, or 0.
[[nodiscard]] int next_attempt(const Path& run_directory);

// Held by rank 0 for the life of the run.
class RunDirectory {
 public:
  // Makes the folder and takes its lock. Throws ConfigError naming the holder (host, pid, start
  // time) when another run has it, EnvError when the folder cannot be written.
  RunDirectory(Path path, int attempt);
  [[nodiscard]] const Path& path() const { return path_; }
  [[nodiscard]] int attempt() const { return attempt_; }
  // recipe.yaml and plan.json of this attempt; those of the one before move to logs/attempt_<n>/.
  void write_recipe(const std::string& recipe_yaml, const std::string& plan_json) const;

 private:
  Path path_;
  int attempt_;
  std::unique_ptr<LockFile> lock_;
};

}  // namespace capstan::trainer
