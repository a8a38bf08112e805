// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>
#include <mutex>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "optim/optimizers_internal.h"

namespace capstan::optim {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, OptimizerBuilder> builders{
      {"adamw", make_adamw}, {"lion", make_lion}, {"sophia", make_sophia}};
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

void Optimizer::step_on_device(const StepNumbers&, uint64_t) {
  CAPSTAN_CHECK(false, "an optimizer that does not read numbers on the device was handed some");
}

void Optimizer::observe_curvature(const CurvaturePass&) {
  CAPSTAN_CHECK(false, "an optimizer that keeps no curvature was handed gradients for it");
}

void register_optimizer(const std::string& name, OptimizerBuilder builder) {
  const std::lock_guard lock(registry().mutex);
  registry().builders[name] = std::move(builder);
}

std::vector<std::string> optimizer_names() {
  const std::lock_guard lock(registry().mutex);
  std::vector<std::string> names;
  for (const auto& [name, builder] : registry().builders) names.push_back(name);
  return names;
}

std::unique_ptr<Optimizer> make_optimizer(const recipe::Optimizer& recipe,
                                          const std::vector<parallel::Shard>& shards) {
  OptimizerBuilder builder;
  {
    const std::lock_guard lock(registry().mutex);
    const auto found = registry().builders.find(recipe.name);
    if (found != registry().builders.end()) builder = found->second;
  }
  if (!builder)
    throw ConfigError(
        ErrorText{.module = "optim",
                  .what = "making the optimizer",
                  .got = fmt::format("optimizer.name '{}'", recipe.name),
                  .need = fmt::format("one of {}", fmt::join(optimizer_names(), ", ")),
                  .why = {},
                  .fix = {}});
  return builder(recipe, shards);
}

}  // namespace capstan::optim
