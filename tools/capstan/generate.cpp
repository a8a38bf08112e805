// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan generate`: sampling from a trained model.
#include <fmt/format.h>

#include <cstdio>
#include <fstream>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/infer/session.h"
#include "device_option.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct GenerateArguments {
  infer::SessionOptions session;
  std::string model, prompt, prompts_file, device = "auto";
  infer::GenerateOptions generate;
  bool greedy = false, json = false, ignore_end = false;
  int64_t threads = 0;
};

std::vector<std::string> read_prompts(const GenerateArguments& arguments, bool has_prompt) {
  if (arguments.prompts_file.empty()) {
    if (!has_prompt) throw ConfigError("error: generate needs --prompt TEXT or --prompts FILE");
    return {arguments.prompt};
  }
  std::ifstream file(arguments.prompts_file);
  if (!file)
    throw ConfigError({.module = "cli",
                       .what = "reading --prompts " + arguments.prompts_file,
                       .got = "no readable file",
                       .need = "one prompt a line"});
  std::vector<std::string> prompts;
  for (std::string line; std::getline(file, line);)
    if (!line.empty()) prompts.push_back(line);
  if (prompts.empty())
    throw ConfigError({.module = "cli",
                       .what = "reading --prompts " + arguments.prompts_file,
                       .got = "no prompt",
                       .need = "one prompt a line"});
  return prompts;
}

void print_json(const std::string& prompt, const infer::Generated& generated) {
  const json::Json line = {{"prompt", prompt},
                           {"text", generated.text},
                           {"tokens", generated.tokens},
                           {"stopped_by", generated.stopped_by}};
  fmt::print("{}\n", line.dump(-1, ' ', false, json::Json::error_handler_t::replace));
}

void generate(GenerateArguments& arguments, bool has_prompt) {
  if (arguments.greedy) arguments.generate.sampling.temperature = 0;
  infer::check_sampling(arguments.generate.sampling);
  const std::vector<std::string> prompts = read_prompts(arguments, has_prompt);
  arguments.session.model = arguments.model;
  if (arguments.threads > 0) arguments.session.threads = arguments.threads;
  arguments.generate.stop_at_end = !arguments.ignore_end;
  start_device(arguments.device);
  infer::Session session(arguments.session);
  (void)session.tokenizer();  // throws where there is none, before anything is printed
  for (size_t i = 0; i < prompts.size(); ++i) {
    arguments.generate.sequence = i;
    if (arguments.json) {
      print_json(prompts[i], infer::generate(session, prompts[i], arguments.generate));
      continue;
    }
    fmt::print("{}", prompts[i]);
    const infer::Generated generated =
        infer::generate(session, prompts[i], arguments.generate, [](std::string_view piece) {
          std::fwrite(piece.data(), 1, piece.size(), stdout);
          std::fflush(stdout);
        });
    fmt::print("\n");
    std::fflush(stdout);
    fmt::print(stderr, "[{} tokens, stopped by {}]\n", generated.tokens.size(),
               generated.stopped_by);
  }
}

}  // namespace

void add_generate(CLI::App& app) {
  auto arguments = std::make_shared<GenerateArguments>();
  CLI::App* verb = app.add_subcommand("generate", "continue a prompt");
  infer::SamplingOptions& sampling = arguments->generate.sampling;
  verb->add_option("--model", arguments->model, "run directory (newest step) or step-* folder")
      ->required()
      ->type_name("DIR");
  CLI::Option* prompt =
      verb->add_option("--prompt", arguments->prompt, "text to continue; may be empty")
          ->type_name("TEXT");
  verb->add_option("--prompts", arguments->prompts_file, "file with one prompt a line")
      ->type_name("FILE")
      ->excludes(prompt);
  verb->add_option("--max-tokens", arguments->generate.max_tokens, "new tokens at the most")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30));
  verb->add_option("--temperature", sampling.temperature, "0 = greedy");
  verb->add_option("--top-k", sampling.top_k, "only the k likeliest tokens; 0 = all");
  verb->add_option("--top-p", sampling.top_p,
                   "only the likeliest tokens that reach this probability");
  verb->add_option("--seed", sampling.seed, "the same seed gives the same text");
  add_device_option(*verb, arguments->device);
  verb->add_option("--threads", arguments->threads, "CPU threads; default all physical cores")
      ->check(CLI::Range(int64_t{1}, int64_t{1024}));
  verb->add_flag("--greedy", arguments->greedy, "always the likeliest token");
  verb->add_flag("--ignore-end", arguments->ignore_end, "go on after the end-of-text token");
  verb->add_flag("--json", arguments->json, "one JSON object per prompt");
  verb->footer(
      "Example:\n  capstan generate --model runs/quickstart --prompt \"#include <vector>\" "
      "--temperature 0.8 --top-p 0.95");
  verb->callback([arguments, prompt] { generate(*arguments, prompt->count() > 0); });
}

}  // namespace capstan::cli
