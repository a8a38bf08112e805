// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "program.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <new>
#include <system_error>

#include "capstan/base/console.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/base/text.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

std::vector<std::string> names_of(const std::vector<VerbName>& verbs) {
  std::vector<std::string> names;
  for (const VerbName& verb : verbs) names.emplace_back(verb.name);
  return names;
}

// A verb that is not a subcommand: of later work, or a slip of the pen.
void check_verb(int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  const std::string verb = argv[1];
  std::vector<std::string> known = names_of(base_verbs());
  for (const std::string& name : names_of(run_verbs())) known.push_back(name);
  for (const std::string& name : known)
    if (name == verb) return;
  for (const VerbName& later : later_verbs())
    if (verb == later.name)
      throw ConfigError(fmt::format("error: '{}' ({}) is not in this build (has: {})", verb,
                                    later.summary, join(known, ", ")));
  const auto nearest = nearest_name(verb, known);
  throw ConfigError(fmt::format("error: unknown verb {}{}. See capstan --help", quote(verb),
                                nearest ? fmt::format(", did you mean '{}'?", *nearest) : ""));
}

std::string nearest_option(const CLI::App* app, const std::string& given) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app->get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  const auto nearest = nearest_name(given, names);
  return nearest ? fmt::format(", did you mean {}?", *nearest) : "";
}

// The option among the words that CLI11 lists behind the colon, or else the first of them.
std::string unexpected_word(const std::string& text) {
  const size_t colon = text.find(": ");
  const std::string words = colon == std::string::npos ? text : text.substr(colon + 2);
  const size_t option = words.find("--");
  const size_t begin = option == std::string::npos ? 0 : option;
  return words.substr(begin, words.find(' ', begin) - begin);
}

const CLI::App* deepest(const CLI::App* app) {
  while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
  return app;
}

int report_usage(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* verb = deepest(&app);
  std::string text = error.what();
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    const std::string word = unexpected_word(text);
    text = fmt::format("unknown argument {}{}", quote(word), nearest_option(verb, word));
  }
  tell(fmt::format("error: {}\nSee capstan {}--help\n", text,
                   verb == &app ? "" : verb->get_name() + " "));
  return exit_codes::kUsage;
}

}  // namespace

const std::vector<VerbName>& base_verbs() {
  static const std::vector<VerbName> verbs = {
      {"train", "train a model from a recipe"},
      {"plan", "what each rank would hold, compute and send"},
      {"data", "tokenizers and token files"},
      {"recipe", "list, show, validate recipes"},
      {"doctor", "what this machine has"}};
  return verbs;
}

const std::vector<VerbName>& run_verbs() {
  static const std::vector<VerbName> verbs = {
      {"eval", "held-out loss of a trained model"},
      {"generate", "continue a prompt"},
      {"checkpoint", "look into checkpoints and verify them"},
      {"prove", "show that a layout computes the run of one rank"}};
  return verbs;
}

const std::vector<VerbName>& later_verbs() {
  static const std::vector<VerbName> verbs = {{"launch", "start ranks on many nodes"},
                                              {"report", "run reports"},
                                              {"flight", "flight recorder files"},
                                              {"transform", "model surgery"},
                                              {"search", "architecture search"},
                                              {"index", "retrieval indexes"},
                                              {"serve", "HTTP serving"}};
  return verbs;
}

std::string version_text() { return "capstan " CAPSTAN_VERSION; }

void frame(CLI::App& app) {
  app.set_version_flag("--version", version_text());
  app.add_option_function<std::string>(
         "--log-level", [](const std::string& name) { log::set_level(log::parse_level(name)); },
         "debug, info, warning, error or off")
      ->type_name("LEVEL")
      ->trigger_on_parse();
  app.fallthrough();
  app.require_subcommand(0, 1);
}

int guard(const std::function<int()>& body, bool inside_run) {
  try {
    return body();
  } catch (const Exit& exit) {
    return exit.code;
  } catch (const Error& error) {
    std::fflush(stdout);
    const std::string text = error.what();
    const bool complete =
        text.rfind("error:", 0) == 0 || text.find(": error:") != std::string::npos;
    const int rank = log::thread_rank();
    const std::string prefix =
        inside_run && rank >= 0 && !complete ? fmt::format("rank {}: ", rank) : "";
    tell(fmt::format("{}{}{}\n", complete ? "" : "error: ", prefix, text));
    return inside_run ? error.run_exit_code() : error.exit_code();
  } catch (const std::system_error& error) {
    if (!inside_run && error.code().value() == EPIPE)
      return exit_codes::kDone;  // the reader has seen enough
    tell(fmt::format("error: {}\n", error.what()));
  } catch (const std::bad_alloc&) {
    tell(fmt::format("error: out of memory\n"));
  } catch (const std::exception& error) {
    tell(fmt::format("error: [internal] {}\n", error.what()));
  }
  return inside_run ? exit_codes::kWorkerFailure : exit_codes::kFailure;
}

int run(CLI::App& app, int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // a closed stdout is an error of the write, and never ends a run
  return guard([&] {
    check_verb(argc, argv);
    try {
      app.parse(argc, argv);
    } catch (const CLI::Success& success) {  // --help, --version
      return app.exit(success);
    } catch (const CLI::ParseError& error) {
      return report_usage(app, error);
    }
    if (app.get_subcommands().empty()) fmt::print("{}", app.help());
    return exit_codes::kDone;
  });
}

std::string capstan_run_path() {
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe");
  return (program.parent_path().parent_path() / "libexec" / "capstan" / "capstan-run").string();
}

void exec_capstan_run(int argc, char** argv) {
  const std::string path = capstan_run_path();
  std::vector<char*> arguments(argv, argv + argc);
  arguments.push_back(nullptr);
  ::execv(path.c_str(), arguments.data());
  throw EnvError({.module = "cli",
                  .what = "starting " + path,
                  .why = std::strerror(errno),
                  .fix = "Build or install Capstan anew"});
}

}  // namespace capstan::cli
