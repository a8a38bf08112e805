// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Saves one step with two ranks as threads, and nothing else: what the fault tests kill and starve
// at every system call. usage: commit_driver CHECKPOINTS_DIRECTORY STEP    exit codes: 0 saved, 3
// the save failed cleanly
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>

#include "capstan/checkpoint/commit.h"
#include "support/commit_group.h"

int main(int argc, char** argv) {
  using namespace capstan;
  using namespace capstan::checkpoint;
  if (argc != 3) return 2;
  const Path directory = argv[1];
  const int64_t step = std::atoll(argv[2]);
  std::atomic<int> failed{0};
  run_with_group(2, [&](CommitGroup& group) {
    std::vector<float> values(512);
    std::iota(values.begin(), values.end(), static_cast<float>(group.rank() * 512 + step));
    const auto bytes = std::as_writable_bytes(std::span(values));
    SaveRequest request{.directory = directory, .step = step};
    for (const char* kind : {"model", "optimizer.exp_avg"})
      request.state.push_back(
          {"policy", kind, "w", {1024}, {{group.rank() * 512}, {512}}, DType::kFp32, bytes, true});
    if (group.rank() == 0)
      request.files = {{"recipe.yaml", "version: 1\n"}, {"state.json", "{}\n"}};
    try {
      (void)save_step(request, group);
      if (group.rank() == 0) apply_retention(directory, {.keep_last = 2});
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      ++failed;
    }
  });
  return failed == 0 ? 0 : 3;
}
