// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan train`: options shared by the launching program and by the ranks.
#pragma once
#include <CLI/CLI.hpp>

#include <string>
#include <vector>

#include "capstan/plan/plan.h"
#include "capstan/recipe/load.h"

namespace capstan::cli {

struct TrainArguments {
  std::string recipe;
  std::vector<std::string> overrides, allow_change;
  int nproc = 1;
  std::string ranks = "processes";
  std::string resume = "auto";
};
CLI::App* add_train_options(CLI::App& app, TrainArguments& arguments);

[[nodiscard]] recipe::Resolved resolve(const TrainArguments& arguments);
// Reads the tokenizer's size when the recipe leaves vocab_size to it.
[[nodiscard]] plan::PlanInputs plan_inputs(const recipe::Recipe& recipe);
// The command that continues this run, as it is printed after a stop.
[[nodiscard]] std::string resume_command(const TrainArguments& arguments);

// bin/capstan: checks recipe and plan, then becomes the one rank or starts and watches several.
void add_train_launcher(CLI::App& app, int argc, char** argv);

}  // namespace capstan::cli
