// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan prove RECIPE`: shows on this machine that the layout of a recipe computes the run of one
// rank.
#include "capstan/trainer/prove.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/recipe/load.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct ProveArguments {
  std::string recipe;
  std::vector<std::string> overrides;
  std::optional<int> nproc;
  int steps = 4;
  uint64_t seed = 1;
  double bar = 1e-9;
};

void print_notes(const trainer::ReducedRun& run) {
  size_t key = 0, change = 0;
  const auto text = [](const trainer::ReductionNote& note) {
    return fmt::format("{} -> {}", note.before, note.after);
  };
  for (const trainer::ReductionNote& note : run.notes) {
    key = std::max(key, note.key.size());
    change = std::max(change, text(note).size());
  }
  fmt::print("made small, with the same layout:\n");
  for (const trainer::ReductionNote& note : run.notes)
    fmt::print("  {:<{}}  {:<{}}  {}\n", note.key, key, text(note), change, note.why);
}

void print_rows(const trainer::ProveReport& report) {
  std::vector<std::vector<std::string>> lines = {{"compared", "of", "values", "largest error"}};
  const auto add = [&](const trainer::ErrorRow& row) {
    lines.push_back({row.kind == "model" ? "weights" : row.kind, row.group,
                     std::to_string(row.values), fmt::format("{:.1e}", row.error)});
  };
  // The numbers of the run first.
  for (const trainer::ErrorRow& row : report.rows)
    if (row.group.empty()) add(row);
  for (const trainer::ErrorRow& row : report.rows)
    if (!row.group.empty()) add(row);
  std::vector<size_t> width(4, 0);
  for (const auto& line : lines)
    for (size_t i = 0; i < line.size(); ++i) width[i] = std::max(width[i], line[i].size());
  for (const auto& line : lines)
    fmt::print("  {:<{}}  {:<{}}  {:>{}}  {:>{}}\n", line[0], width[0], line[1], width[1], line[2],
               width[2], line[3], width[3]);
}

void run_prove(const ProveArguments& arguments) {
  trainer::ProveOptions options;
  options.recipe = recipe::load_recipe(recipe::find_recipe(arguments.recipe), arguments.overrides);
  options.world = arguments.nproc;
  options.steps = arguments.steps;
  options.seed = arguments.seed;
  options.bar = arguments.bar;
  const trainer::ProveReport report = trainer::prove(options);
  print_notes(report.reduced);
  fmt::print("{} steps of {} samples, {}:\n", options.steps,
             report.reduced.recipe.batch.global_samples, report.layout);
  print_rows(report);
  if (report.is_proven())
    fmt::print("proven: {} computes the run of one rank (largest error {:.1e}, bar {:g})\n",
               report.layout, report.error, report.bar);
  std::fflush(stdout);
  if (report.is_proven()) return;
  fmt::print(stderr, "error: {} does not compute the run of one rank. {}\n", report.layout,
             trainer::describe(*report.first, report.bar));
  throw Exit{exit_codes::kFailure};
}

}  // namespace

void add_prove(CLI::App& app) {
  auto arguments = std::make_shared<ProveArguments>();
  CLI::App* verb = app.add_subcommand("prove", "show that a layout computes the run of one rank");
  verb->add_option("RECIPE", arguments->recipe, "a file, or a name of `capstan recipe list`")
      ->required();
  verb->add_option("--set", arguments->overrides,
                   "override a value, e.g. --set parallel.tensor=2 (repeatable)")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  verb->add_option("--nproc", arguments->nproc,
                   "ranks of the whole run; default: what its axes need")
      ->check(CLI::Range(1, 65536))
      ->type_name("N");
  verb->add_option("--steps", arguments->steps, "steps that are compared")
      ->check(CLI::Range(1, 40))
      ->capture_default_str();
  verb->add_option("--seed", arguments->seed, "of the weights and rows")
      ->check(CLI::Range(uint64_t{0}, uint64_t{1} << 53))
      ->capture_default_str();
  verb->add_option("--bar", arguments->bar, "largest error that counts as equal")
      ->check(CLI::NonNegativeNumber);
  verb->footer(
      "Example:\n  capstan prove quickstart --set parallel.tensor=2 --set parallel.zero.stage=3\n"
      "Runs the recipe's layout in fp64 on a model made small, as threads of this process, and\n"
      "compares every loss, weight and optimizer state with the run of one rank. Needs no data.\n"
      "Exit code 0: proven; 1: not, and the message says where the runs part.");
  verb->callback([arguments] { run_prove(*arguments); });
}

}  // namespace capstan::cli
