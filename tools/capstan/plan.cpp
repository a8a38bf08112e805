// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// capstan plan RECIPE: what a run would do, without starting it.
#include "capstan/plan/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/base/file.h"
#include "capstan/base/json.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct PlanOptions {
  std::string recipe;
  std::vector<std::string> overrides;
  int world = 1;
  std::optional<int> ranks_per_host;                      // default: all ranks on one host
  std::optional<double> host_memory_gib, gpu_memory_gib;  // default: what this machine has
  bool json = false;
  bool should_draw = false;
  std::string drawing;  // file; empty = as text
  std::string hardware;
};

// Ids a tokenizer.json can give: entries of the vocabulary and added tokens, or more when ids have
// gaps.
int64_t count_vocabulary(const std::filesystem::path& path) {
  const std::string origin = path.string();
  const json::Json file = json::parse(read_file(path), origin);
  const json::Json& vocabulary = json::field(json::field(file, "model", origin), "vocab", origin);
  if (!vocabulary.is_object())
    throw DataError(ErrorText{.module = "plan",
                              .what = "reading the tokenizer " + origin,
                              .got = std::string("model.vocab as ") + vocabulary.type_name(),
                              .need = "an object from token to id"});
  constexpr int64_t kMostIds = int64_t{1} << 31;
  int64_t count = static_cast<int64_t>(vocabulary.size()), largest = -1;
  for (const auto& [token, id] : vocabulary.items())
    largest = std::max(largest, json::get_int(vocabulary, token.c_str(), 0, kMostIds, origin));
  if (const auto added = file.find("added_tokens"); added != file.end() && added->is_array())
    for (const json::Json& entry : *added) {
      if (!vocabulary.contains(json::get_string(entry, "content", origin))) ++count;
      largest = std::max(largest, json::get_int(entry, "id", 0, kMostIds, origin));
    }
  return std::max(count, largest + 1);
}

std::optional<int64_t> tokenizer_size(const recipe::Recipe& recipe) {
  if (!recipe.data.tokenizer) return std::nullopt;
  const std::filesystem::path path =
      std::filesystem::path(*recipe.data.tokenizer) / "tokenizer.json";
  if (std::filesystem::exists(path)) return count_vocabulary(path);
  if (recipe.model.vocab_size) return std::nullopt;
  throw ConfigError(ErrorText{
      .module = "plan",
      .what = "model.vocab_size: auto",
      .got = "no " + path.string(),
      .need = "the size of the vocabulary",
      .fix = "Make the tokenizer (capstan data tokenizer train --help) or write the size: "
             "--set model.vocab_size=8192"});
}

// The order of a step, each forward and each half of a backward taken as one unit of time.
std::string draw(const plan::Schedule& schedule, const std::string& file) {
  const plan::Timeline timeline = plan::simulate_schedule(schedule, {});
  if (file.empty()) return plan::draw_timeline(schedule, timeline);
  if (std::filesystem::path(file).extension() != ".svg")
    throw ConfigError(ErrorText{.module = "plan",
                                .what = "--draw",
                                .got = file,
                                .need = "a file name that ends in .svg, or none to draw as text",
                                .fix = "capstan plan RECIPE --draw pipeline.svg"});
  write_file_atomic(file, plan::draw_timeline_svg(schedule, timeline));
  return fmt::format("drew schedule {} to {}\n", schedule.name, file);
}

int64_t bytes_of(double gib) { return static_cast<int64_t>(gib * static_cast<double>(kGiB)); }

// Hosts as asked for; without flags all ranks are on this one.
plan::Topology topology_of(const PlanOptions& options, const recipe::Run& run) {
  const int local = options.ranks_per_host.value_or(options.world);
  if (options.world % local != 0)
    throw ConfigError(ErrorText{.module = "plan",
                                .what = "--ranks-per-host",
                                .got = fmt::format("{} for {} ranks", local, options.world),
                                .need = "a divisor of --world",
                                .why = "every host starts as many ranks"});
  plan::Topology topology = plan::local_topology(options.world, local, run.device);
  const bool found_gpus = topology.device == "cuda";
  const bool on_gpus = found_gpus || run.device == "cuda" || options.gpu_memory_gib;
  if (options.gpu_memory_gib && run.device == "cpu")
    throw ConfigError(ErrorText{.module = "plan",
                                .what = "--gpu-memory",
                                .got = "run.device: cpu",
                                .need = "a run on GPUs",
                                .fix = "Leave the flag out, or --set run.device=cuda"});
  if (options.host_memory_gib)
    (on_gpus ? topology.host_memory_bytes : topology.memory_bytes) =
        bytes_of(*options.host_memory_gib);
  if (!on_gpus) return topology;
  topology.device = "cuda";  // planning needs no GPU here
  topology.fast_bf16 = true;
  if (options.gpu_memory_gib)
    topology.memory_bytes = bytes_of(*options.gpu_memory_gib) * local;
  else if (!found_gpus)
    topology.memory_bytes = 0;
  return topology;
}

void run_plan(const PlanOptions& options) {
  if (!options.hardware.empty())
    throw ConfigError(
        ErrorText{.module = "plan",
                  .what = "--hardware",
                  .got = options.hardware,
                  .why = "step-time prediction from a hardware file is not in this build",
                  .fix = "Leave the flag out"});
  const auto recipe = recipe::load_recipe(recipe::find_recipe(options.recipe), options.overrides);
  plan::PlanInputs inputs;
  inputs.tokenizer_vocab_size = tokenizer_size(recipe.recipe);
  const auto plan = plan::make_plan(recipe, topology_of(options, recipe.recipe.run), inputs);
  if (options.should_draw)
    fmt::print("{}", draw(plan.schedule, options.drawing));
  else
    fmt::print("{}", options.json ? plan::plan_json(plan) : plan::describe_plan(plan));
  if (plan.topology.memory_bytes == 0 && !options.json && !options.should_draw)
    fmt::print(
        "note        no GPU here says how much memory it has: --gpu-memory GIB checks the plan\n");
  std::fflush(stdout);
}

}  // namespace

void add_plan(CLI::App& app) {
  auto options = std::make_shared<PlanOptions>();
  CLI::App* verb = app.add_subcommand(
      "plan", "Show layout, memory, FLOPs and traffic of a run without starting it");
  verb->add_option("recipe", options->recipe, "Recipe file, or a name from `capstan recipe list`")
      ->required();
  verb->add_option("--set", options->overrides,
                   "Change a key: --set optimizer.lr=1.0e-3 (may be repeated)")
      ->allow_extra_args(false);
  verb->add_option("--world", options->world, "Ranks of the run")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  verb->add_option("--ranks-per-host", options->ranks_per_host,
                   "Ranks that share a host and its memory (default: all of them)")
      ->check(CLI::Range(1, 65536));
  verb->add_option("--host-memory", options->host_memory_gib,
                   "GiB that the ranks of a host share; on GPUs what they offload to (default: "
                   "what this machine has)")
      ->check(CLI::Range(0.001, 1e9));
  verb->add_option("--gpu-memory", options->gpu_memory_gib,
                   "GiB of each GPU, which need not be here (default: what those of this machine "
                   "have)")
      ->check(CLI::Range(0.001, 1e6));
  CLI::Option* json =
      verb->add_flag("--json", options->json, "For programs: the content of plan.json");
  CLI::Option* drawing =
      verb->add_option("--draw", options->drawing,
                       "Draw the pipeline schedule over time: as text, or to FILE.svg")
          ->expected(0, 1)
          ->type_name("[FILE.svg]")
          ->excludes(json);
  verb->add_option("--hardware", options->hardware,
                   "Not in this build: hardware file for a prediction of time");
  verb->footer(
      "Example:\n  capstan plan quickstart --world 2 --set model.vocab_size=8192\n"
      "  capstan plan quickstart --set model.vocab_size=8192 --draw pipeline.svg\n"
      "  capstan plan llama3/8b-8gpu --world 8 --gpu-memory 80");
  verb->callback([options, drawing] {
    options->should_draw = drawing->count() > 0;
    run_plan(*options);
  });
}

}  // namespace capstan::cli
