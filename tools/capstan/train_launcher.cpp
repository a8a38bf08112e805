// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan train` in bin/capstan: refuses what cannot run before any rank starts, then becomes the
// one rank, or starts several and watches them.
#include <fmt/format.h>

#include <csignal>

#include "capstan/base/console.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "capstan/launch/local.h"
#include "program.h"
#include "train.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

bool is_launched() { return read_env("RANK").has_value() || read_env("CAPSTAN_RANK").has_value(); }

Path run_directory_of(const recipe::Recipe& recipe) {
  return recipe.run.directory ? Path(*recipe.run.directory) : Path("runs") / recipe.run.name;
}

// Another run in the directory is found before ranks start; rank 0 takes the lock for good.
void check_not_in_use(const Path& run_directory) {
  std::error_code ignored;
  if (!std::filesystem::exists(run_directory / "lock", ignored)) return;
  std::string holder;
  if (LockFile::try_acquire(run_directory / "lock", "", &holder)) return;
  throw ConfigError({.module = "cli",
                     .what = "opening the run directory " + run_directory.string(),
                     .got = "another run in it: " + holder,
                     .need = "a directory of its own for each run",
                     .fix = "Wait for that run to end, or give another name: --set run.name=NAME"});
}

void check_environment(const TrainArguments& arguments) {
  if (!is_launched()) return;
  if (arguments.nproc > 1 || arguments.ranks == "threads")
    throw ConfigError({.module = "cli",
                       .what = "--nproc or --ranks",
                       .got = "ranks that a launcher has started already (RANK is set)",
                       .need = "one of the two",
                       .fix = "Leave --nproc to the launcher, or unset RANK and WORLD_SIZE"});
}

std::vector<std::string> rank_command(int argc, char** argv) {
  std::vector<std::string> command(argv, argv + argc);
  command.front() = capstan_run_path();
  return command;
}

// exit.json of a run whose ranks were watched from here: the cause is the launcher's to know.
void write_exit_json(const Path& run_directory, const launch::LaunchResult& result) {
  if (!result.failure || result.exit_code == exit_codes::kUsage) return;  // 2: nothing was started
  const launch::RankFailure& f = *result.failure;
  const json::Json report = {{"code", result.exit_code},
                             {"class", f.class_name.empty() ? "worker" : f.class_name},
                             {"rank", f.rank},
                             {"host", host_name()},
                             {"signal", f.signal},
                             {"worker_exit_code", f.exit_code},
                             {"message", f.message.empty() ? f.reason : f.message},
                             {"time", utc_now()}};
  try {
    write_file_atomic(run_directory / "exit.json",
                      report.dump(1, ' ', false, json::Json::error_handler_t::replace) + "\n");
  } catch (const Error& error) {
    log::warning("cli", "exit.json was not written: {}", error.what());
  }
}

int start_ranks(const TrainArguments& arguments, const Path& run_directory, int argc, char** argv) {
  const Path attempt = launch::make_attempt_directory(run_directory / "logs");
  const std::string name = attempt.filename().string();
  launch::LocalLaunch launch{
      .command = rank_command(argc, argv), .nproc = arguments.nproc, .log_directory = attempt};
  launch.environment["CAPSTAN_ATTEMPT"] = name.substr(name.find('_') + 1);
  if (!read_env("GOMP_SPINCOUNT"))
    launch.environment["GOMP_SPINCOUNT"] = "1000";  // ranks share cores: do not burn them waiting
  const launch::LaunchResult result = launch::run_local(launch);
  const std::string report = launch::describe(result);
  if (!report.empty()) tell(fmt::format("{}\n", report));
  write_exit_json(run_directory, result);
  if (result.stop_signal != 0 &&
      result.exit_code == 128 + result.stop_signal) {  // stopped hard: end by that signal
    std::signal(result.stop_signal, SIG_DFL);
    std::raise(result.stop_signal);
  }
  return result.exit_code;
}

int launch_train(const TrainArguments& arguments, int argc, char** argv) {
  check_environment(arguments);
  const recipe::Resolved recipe = resolve(arguments);
  const int world = is_launched()
                        ? static_cast<int>(read_env_int("WORLD_SIZE", 1, 1 << 20).value_or(1))
                        : arguments.nproc;
  const plan::Plan plan = plan::make_plan(recipe, plan::local_topology(world, arguments.nproc),
                                          plan_inputs(recipe.recipe));
  const Path run_directory = run_directory_of(plan.resolved);
  if (!is_launched()) check_not_in_use(run_directory);
  if (arguments.nproc > allowed_cpus())
    log::warning("cli", "--nproc {}: only {} processors are allowed here; ranks will take turns",
                 arguments.nproc, allowed_cpus());
  if (is_launched() || arguments.nproc == 1 || arguments.ranks == "threads") {
    if (!read_env("GOMP_SPINCOUNT"))
      ::setenv("GOMP_SPINCOUNT", "1000", 0);  // must be set before the OpenMP runtime loads
    exec_capstan_run(argc, argv);
  }
  return start_ranks(arguments, run_directory, argc, argv);
}

}  // namespace

void add_train_launcher(CLI::App& app, int argc, char** argv) {
  auto arguments = std::make_shared<TrainArguments>();
  CLI::App* verb = add_train_options(app, *arguments);
  verb->callback([arguments, argc, argv] { throw Exit{launch_train(*arguments, argc, argv)}; });
}

}  // namespace capstan::cli
