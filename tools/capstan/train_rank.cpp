// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan train` on a rank: joins the others as the environment says, or is the only rank, or runs
// all ranks as threads.
#include "train.h"

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/comm/nccl.h"
#include "capstan/comm/world.h"
#include "capstan/device/accelerator.h"
#include "capstan/device/allocator.h"
#include "capstan/device/cuda.h"
#include "capstan/launch/rank_env.h"
#include "capstan/trainer/stop.h"
#include "capstan/trainer/train.h"
#include "program.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

trainer::TrainOptions make_options(const TrainArguments& arguments, int local_size) {
  trainer::TrainOptions options;
  options.recipe = resolve(arguments);
  options.resume = arguments.resume;
  options.allow_change = arguments.allow_change;
  options.local_size = local_size;
  options.resume_command = resume_command(arguments);
  if (const auto attempt = read_env_int("CAPSTAN_ATTEMPT", 0, 1'000'000))
    options.attempt = static_cast<int>(*attempt);
  return options;
}

int train_as_threads(const TrainArguments& arguments) {
  trainer::TrainOptions options = make_options(arguments, arguments.nproc);
  std::string& device = options.recipe.recipe.run.device;
  if (device == "cuda")
    throw ConfigError(ErrorText{.module = "train",
                                .what = "--ranks threads",
                                .got = "run.device cuda",
                                .need = "--ranks processes",
                                .why = "a GPU belongs to a process",
                                .fix = ""});
  device = "cpu";
  return trainer::train_as_threads(options, arguments.nproc).exit_code;
}

// Beside our own and torchrun's names also those of mpirun and srun.
comm::RankEnv place_of_this_rank() {
  const launch::RankEnv env = launch::read_rank_env();
  if (env.launched && env.rank == 0 && env.world_size > 1)
    log::info("launch", "{} ranks, {} on this machine, as {} says; they meet at {} port {}",
              env.world_size, env.local_world_size, env.source, env.master_addr, env.master_port);
  return {.rank = env.rank,
          .size = env.world_size,
          .local_rank = env.local_rank,
          .local_size = env.local_world_size,
          .master_addr = env.master_addr,
          .master_port = env.master_port,
          .store_descriptor = env.store_fd};
}

// Known before the plan is: LibTorch decides at its first op whether CUDA exists.
bool computes_on_cuda(const recipe::Run& run, const comm::RankEnv& env) {
  if (run.device != "auto") return run.device == "cuda";
  return plan::local_topology(env.size, env.local_size, run.device).device == "cuda";
}

int train_as_process(const TrainArguments& arguments) {
  const comm::RankEnv env = place_of_this_rank();
  if (env.size > 1) log::set_thread_rank(env.rank);
  device::set_default_rank(env.rank);
  const trainer::TrainOptions options = make_options(arguments, env.local_size);
  if (computes_on_cuda(options.recipe.recipe.run, env)) device::start_cuda(env.local_rank);
  comm::World world(env, options.recipe.recipe.run.start_timeout_s);
  if (device::Accelerator* const gpu = device::accelerator())
    world.use_nccl(comm::installed_nccl_api(), *gpu);
  const trainer::TrainResult result = trainer::train(options, world.communicator());
  world.close();
  return result.exit_code;
}

// What the launcher learns of a failure comes through the error file; what a user learns, through
// stderr.
int train(const TrainArguments& arguments) {
  const trainer::StopSignals signals;
  return guard(
      [&] {
        try {
          const int code = arguments.ranks == "threads" ? train_as_threads(arguments)
                                                        : train_as_process(arguments);
          launch::declare_done();
          return code;
        } catch (const Error& error) {
          launch::write_error_file(error, error.run_exit_code());
          throw;
        } catch (const std::exception& error) {
          launch::write_error_file(error, exit_codes::kWorkerFailure);
          throw;
        }
      },
      true);
}

}  // namespace

void add_train(CLI::App& app) {
  auto arguments = std::make_shared<TrainArguments>();
  CLI::App* verb = add_train_options(app, *arguments);
  verb->callback([arguments] { throw Exit{train(*arguments)}; });
}

}  // namespace capstan::cli
