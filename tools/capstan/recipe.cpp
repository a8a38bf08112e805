// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// capstan recipe list|show|validate|schema
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/recipe/load.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct RecipeOptions {
  std::string name;
  std::vector<std::string> overrides;
  bool markdown = false, plain = false;
};
using SharedOptions = std::shared_ptr<RecipeOptions>;

// A reader that went away (`| head`) or a closed stdout ends the program quietly.
void print(const std::string& text) {
  std::signal(SIGPIPE, SIG_IGN);
  errno = 0;
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (written && std::fflush(stdout) == 0) return;
  const int code = errno;
  if (code == EPIPE || code == EBADF) throw Exit{0};
  throw EnvError(ErrorText{.module = "recipe",
                           .what = "writing to standard output",
                           .got = std::error_code(code, std::generic_category()).message()});
}

recipe::Resolved load(const RecipeOptions& options) {
  return recipe::load_recipe(recipe::find_recipe(options.name), options.overrides);
}

void print_list() {
  const std::vector<recipe::CatalogueEntry> entries = recipe::list_recipes();
  size_t width = 0;
  for (const auto& entry : entries) width = std::max(width, entry.name.size());
  std::string text;
  for (const auto& entry : entries) {
    text += fmt::format("{:<{}}  {}\n", entry.name, width, entry.summary);
  }
  print(text.empty() ? "No recipes were found.\n" : text);
}

void add_recipe_options(CLI::App& verb, const SharedOptions& options) {
  verb.add_option("RECIPE", options->name, "File, or name from `capstan recipe list`")->required();
  // One value per --set: a recipe name after it stays a recipe name.
  verb.add_option("--set", options->overrides, "KEY=VALUE; may be repeated; last one wins")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

void add_list(CLI::App& recipe) {
  CLI::App* verb = recipe.add_subcommand("list", "The recipes that can be named");
  verb->footer("Example:\n  capstan recipe list");
  verb->callback(print_list);
}

void add_show(CLI::App& recipe) {
  auto options = std::make_shared<RecipeOptions>();
  CLI::App* verb =
      recipe.add_subcommand("show", "Every key of a recipe and where its value comes from");
  add_recipe_options(*verb, options);
  verb->add_flag("--plain", options->plain, "Without the comments that name the origins");
  verb->footer("Example:\n  capstan recipe show quickstart --set run.steps=2000");
  verb->callback([options] { print(recipe::dump_recipe(load(*options), !options->plain)); });
}

void add_validate(CLI::App& recipe) {
  auto options = std::make_shared<RecipeOptions>();
  CLI::App* verb =
      recipe.add_subcommand("validate", "Check a recipe; exit code 2 lists all problems");
  add_recipe_options(*verb, options);
  verb->footer("Example:\n  capstan recipe validate my.yaml");
  verb->callback([options] {
    const recipe::Resolved resolved = load(*options);
    print(fmt::format("{}: valid\n", resolved.files.back().string()));
  });
}

void add_schema(CLI::App& recipe) {
  auto options = std::make_shared<RecipeOptions>();
  CLI::App* verb = recipe.add_subcommand("schema", "JSON Schema of recipes, for editors");
  verb->add_flag("--markdown", options->markdown,
                 "The reference of all keys instead (docs/recipes.md)");
  verb->footer("Example:\n  capstan recipe schema > recipe.schema.json");
  verb->callback([options] {
    print(options->markdown ? recipe::markdown_reference() : recipe::json_schema());
  });
}

}  // namespace

void add_recipe(CLI::App& app) {
  CLI::App* recipe = app.add_subcommand("recipe", "List, show and check recipes");
  recipe->footer("Example:\n  capstan recipe show quickstart");
  recipe->require_subcommand(1);
  add_list(*recipe);
  add_show(*recipe);
  add_validate(*recipe);
  add_schema(*recipe);
}

}  // namespace capstan::cli
