// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Every recipe of configs/ loads and can be planned for the ranks that its comment names.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <regex>

#include "capstan/base/file.h"
#include "capstan/plan/plan.h"

namespace capstan::plan {
namespace {

const std::filesystem::path kConfigs = std::filesystem::path(CAPSTAN_SOURCE_DIR) / "configs";

std::vector<std::filesystem::path> all_configs() {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kConfigs))
    if (entry.path().extension() == ".yaml") files.push_back(entry.path());
  return files;
}

// "--nproc 4" or "--world 64" in the comment; 1 where neither is.
int world_of(const std::string& text) {
  std::smatch found;
  static const std::regex kRanks("#[^\n]*--(nproc|world) ([0-9]+)");
  return std::regex_search(text, found, kRanks) ? std::stoi(found[2]) : 1;
}

TEST(Configs, All_PlanForTheRanksOfTheirComment) {
  constexpr int64_t kDeviceBytes = int64_t{80} << 30;
  int several = 0;
  const auto files = all_configs();
  for (const auto& file : files) {
    SCOPED_TRACE(file.string());
    const int world = world_of(read_file(file));
    Topology topology;
    topology.world_size = world;
    topology.local_size = topology.physical_cores = std::min(world, 8);
    topology.memory_bytes = kDeviceBytes * topology.local_size;  // no rank has more than 80 GiB
    topology.fast_bf16 = true;
    const auto recipe = recipe::load_recipe(file);
    if (recipe.recipe.run.device == "cuda") topology.device = "cuda";
    PlanInputs inputs;
    if (!recipe.recipe.model.vocab_size) inputs.tokenizer_vocab_size = 8192;
    const Plan plan = make_plan(recipe, topology, inputs);
    EXPECT_EQ(plan.grid.size(), world);
    const auto relative = file.lexically_relative(kConfigs).replace_extension().string();
    // A comment that gives a command gives this recipe's.
    EXPECT_TRUE(world == 1 || read_file(file).find(" " + relative + " --") != std::string::npos);
    several += world > 1;
  }
  EXPECT_GE(files.size(), 18U);
  EXPECT_GE(several, 10);
}

// Names of the large models say how many parameters they have.
TEST(Configs, LargeModels_HaveTheirSize) {
  const std::pair<const char*, double> sizes[] = {
      {"llama3/8b-8gpu", 8.03e9},       {"llama3/70b-64gpu", 70.55e9},
      {"llama3/405b-512gpu", 405.85e9}, {"mixtral/8x7b-64gpu", 46.70e9},
      {"gpt2/124m", 124.44e6},          {"qwen2.5/0.5b", 494.03e6},
      {"qwen2.5/1.5b", 1543.71e6},      {"qwen2.5/3b", 3085.94e6},
      {"qwen2.5/7b", 7615.62e6}};
  for (const auto& [name, parameters] : sizes) {
    const auto file = kConfigs / (std::string(name) + ".yaml");
    Topology topology;
    topology.world_size = topology.local_size = topology.physical_cores = world_of(read_file(file));
    const auto recipe = recipe::load_recipe(file);
    if (recipe.recipe.run.device == "cuda") topology.device = "cuda";
    const Plan plan = make_plan(recipe, topology, {});
    EXPECT_NEAR(static_cast<double>(plan.model().parameters) / parameters, 1, 1e-3) << name;
  }
}

}  // namespace
}  // namespace capstan::plan
