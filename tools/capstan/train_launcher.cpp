// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan train` in bin/capstan: refuses what cannot run before any rank starts, then becomes the
// one rank, or starts several and watches them.
#include <fmt/format.h>

#include <csignal>

#include "capstan/base/console.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/launch/local.h"
#include "capstan/launch/rank_env.h"
#include "capstan/launch/run_folder.h"
#include "program.h"
#include "train.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

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

void check_environment(const TrainArguments& arguments, const launch::RankEnv& env) {
  if (!env.launched) return;
  if (arguments.nproc > 1 || arguments.ranks == "threads")
    throw ConfigError({.module = "cli",
                       .what = "--nproc or --ranks",
                       .got = "ranks that a launcher has started already: " + env.source,
                       .need = "one of the two",
                       .fix = "Leave --nproc to the launcher, or unset what it has set"});
}

bool is_stopped_hard(const launch::LaunchResult& result) {
  return result.stop_signal != 0 && result.exit_code == 128 + result.stop_signal;
}

std::vector<std::string> rank_command(int argc, char** argv) {
  std::vector<std::string> command(argv, argv + argc);
  command.front() = capstan_run_path();
  return command;
}

// exit.json of a run whose ranks were watched from here: which failed first is the launcher's to
// know. A run that came to its own end has its report from rank 0.
void write_exit_report(const Path& run_directory, const launch::LaunchResult& result) {
  if (result.exit_code == exit_codes::kUsage) return;  // nothing was started
  if (result.failure) {
    const launch::RankFailure& f = *result.failure;
    launch::write_exit_report(
        run_directory,
        {.code = result.exit_code,
         .cause = launch::cause_of_error(f.class_name),
         .error = f.class_name,
         .rank = f.rank,
         .signal = f.signal,
         .worker_exit_code = f.signal == 0 ? std::optional(f.exit_code) : std::nullopt,
         .message = f.message.empty() ? f.reason : f.message});
  } else if (is_stopped_hard(result)) {
    launch::write_exit_report(run_directory, {.code = result.exit_code,
                                              .cause = "stopped",
                                              .signal = result.stop_signal,
                                              .message = "stopped before the ranks had saved"});
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
  write_exit_report(run_directory, result);
  if (is_stopped_hard(result)) {  // end by that signal
    std::signal(result.stop_signal, SIG_DFL);
    std::raise(result.stop_signal);
  }
  return result.exit_code;
}

int launch_train(const TrainArguments& arguments, int argc, char** argv) {
  const launch::RankEnv env = launch::read_rank_env();
  check_environment(arguments, env);
  const recipe::Resolved recipe = resolve(arguments);
  const int world = env.launched ? env.world_size : arguments.nproc;
  const int local = env.launched ? env.local_world_size : arguments.nproc;
  const plan::Plan plan =
      plan::make_plan(recipe, plan::local_topology(world, local, recipe.recipe.run.device),
                      plan_inputs(recipe.recipe));
  const Path run_directory = run_directory_of(plan.resolved);
  if (!env.launched) {
    check_not_in_use(run_directory);
    if (arguments.resume == "none") launch::check_unused(run_directory, -1);
  }
  if (local > allowed_cpus() && env.local_rank == 0)
    log::warning("cli",
                 "{} ranks on this machine: only {} processors are allowed here; they will "
                 "take turns",
                 local, allowed_cpus());
  if (env.launched || arguments.nproc == 1 || arguments.ranks == "threads") {
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
