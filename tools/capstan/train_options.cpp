// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "train.h"

#include <fmt/format.h>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "capstan/text/tokenizer.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

std::string shell_word(const std::string& word) {
  if (!word.empty() &&
      word.find_first_not_of(
          "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./:,@%") ==
          std::string::npos)
    return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

}  // namespace

CLI::App* add_train_options(CLI::App& app, TrainArguments& arguments) {
  CLI::App* train = app.add_subcommand("train", "train a model from a recipe");
  train->add_option("RECIPE", arguments.recipe, "a file, or a name of `capstan recipe list`");
  train
      ->add_option("--set", arguments.overrides,
                   "override a value, e.g. --set optimizer.lr=1e-3 (repeatable)")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  train->add_option("--nproc", arguments.nproc, "ranks on this machine")
      ->check(CLI::Range(1, 1024))
      ->type_name("N");
  train->add_option("--ranks", arguments.ranks, "ranks are processes or threads of one process")
      ->check(CLI::IsMember({"processes", "threads"}));
  train
      ->add_option(
          "--resume", arguments.resume,
          "auto: go on if there is a checkpoint; none: the run must be new; DIR: a step-* folder")
      ->type_name("auto|none|DIR");
  train
      ->add_option("--allow-change", arguments.allow_change,
                   "a recipe key that may differ from the checkpoint's (repeatable)")
      ->type_name("KEY")
      ->allow_extra_args(false);
  train->footer(
      "Example:\n  capstan train quickstart --nproc 2 --set run.steps=100\n"
      "Ctrl-C saves a checkpoint and ends with code 90; the same command goes on from there.");
  return train;
}

recipe::Resolved resolve(const TrainArguments& arguments) {
  if (arguments.recipe.empty()) {
    std::string text = "error: RECIPE is missing. The catalogue:\n";
    for (const recipe::CatalogueEntry& entry : recipe::list_recipes())
      text += fmt::format("  {:<16} {}\n", entry.name, entry.summary);
    throw ConfigError(text + "Example: capstan train quickstart --nproc 2");
  }
  return recipe::load_recipe(recipe::find_recipe(arguments.recipe), arguments.overrides);
}

plan::PlanInputs plan_inputs(const recipe::Recipe& recipe) {
  if (!recipe.data.tokenizer) return {};
  return {.tokenizer_vocab_size = text::Tokenizer::load(*recipe.data.tokenizer).vocab_size()};
}

std::string resume_command(const TrainArguments& arguments) {
  std::string command = "capstan train " + shell_word(arguments.recipe);
  for (const std::string& change : arguments.overrides) command += " --set " + shell_word(change);
  if (arguments.nproc != 1) command += fmt::format(" --nproc {}", arguments.nproc);
  if (arguments.ranks != "processes") command += " --ranks " + arguments.ranks;
  for (const std::string& key : arguments.allow_change)
    command += " --allow-change " + shell_word(key);
  return command;
}

}  // namespace capstan::cli
