// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/trainer/run_directory.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"

namespace capstan::trainer {
namespace {

std::optional<int> attempt_of(const std::string& folder) {
  constexpr std::string_view kPrefix = "attempt_";
  if (folder.rfind(kPrefix, 0) != 0) return std::nullopt;
  int attempt = 0;
  const char* end = folder.data() + folder.size();
  const auto [rest, error] = std::from_chars(folder.data() + kPrefix.size(), end, attempt);
  return error == std::errc() && rest == end ? std::optional(attempt) : std::nullopt;
}

// The recipe and plan in the top folder belong to the newest attempt; older ones are kept beside
// their logs.
void keep_older(const Path& run_directory, const char* name, int attempt) {
  const Path current = run_directory / name;
  std::error_code ignored;
  if (attempt == 0 || !std::filesystem::exists(current, ignored)) return;
  const Path folder = attempt_folder(run_directory, attempt - 1);
  std::filesystem::create_directories(folder, ignored);
  std::filesystem::copy_file(current, folder / name,
                             std::filesystem::copy_options::overwrite_existing, ignored);
}

}  // namespace

Path run_directory_of(const recipe::Recipe& recipe) {
  return recipe.run.directory ? Path(*recipe.run.directory) : Path("runs") / recipe.run.name;
}

Path attempt_folder(const Path& run_directory, int attempt) {
  return run_directory / "logs" / fmt::format("attempt_{}", attempt);
}

int next_attempt(const Path& run_directory) {
  int next = 0;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(run_directory / "logs", missing)) {
    const auto attempt = attempt_of(entry.path().filename().string());
    if (attempt) next = std::max(next, *attempt + 1);
  }
  return next;
}

RunDirectory::RunDirectory(Path path, int attempt) : path_(std::move(path)), attempt_(attempt) {
  create_directories_durable(path_);
  const json::Json mine = {{"host", host_name()}, {"pid", ::getpid()}, {"started", utc_now()}};
  std::string holder;
  lock_ = LockFile::try_acquire(path_ / "lock", mine.dump() + "\n", &holder);
  while (!holder.empty() && holder.back() == '\n') holder.pop_back();
  if (!lock_)
    throw ConfigError(
        {.module = "trainer",
         .what = "opening the run directory " + path_.string(),
         .got = "another run in it: " + holder,
         .need = "a directory of its own for each run",
         .fix = "Wait for that run to end, or give another name: --set run.name=NAME"});
  std::error_code ignored;
  std::filesystem::create_directories(attempt_folder(path_, attempt_), ignored);
  std::filesystem::create_directories(path_ / "checkpoints", ignored);
}

void RunDirectory::write_recipe(const std::string& recipe_yaml,
                                const std::string& plan_json) const {
  keep_older(path_, "recipe.yaml", attempt_);
  keep_older(path_, "plan.json", attempt_);
  write_file_atomic(path_ / "recipe.yaml", recipe_yaml);
  write_file_atomic(path_ / "plan.json", plan_json);
}

}  // namespace capstan::trainer
