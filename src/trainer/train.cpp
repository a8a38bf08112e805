// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/trainer/train.h"

#include <fmt/format.h>

#include "capstan/base/bytes.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/checkpoint/saver.h"
#include "capstan/comm/threads.h"
#include "capstan/device/accelerator.h"
#include "capstan/device/cuda.h"
#include "capstan/device/threads.h"
#include "capstan/launch/run_folder.h"
#include "capstan/plan/fp8.h"
#include "capstan/text/tokenizer.h"
#include "capstan/trainer/run_directory.h"
#include "trainer/loop.h"
#include "trainer/resume.h"

namespace capstan::trainer {
namespace {

// Rank 0 opens the directory; every rank learns whether that worked.
std::unique_ptr<RunDirectory> open_run_directory(const Path& path, const TrainOptions& options,
                                                 checkpoint::CommitGroup& group) {
  std::unique_ptr<RunDirectory> directory;
  std::string failure;
  if (group.rank() == 0) {
    try {
      if (options.resume == "none") launch::check_unused(path, options.attempt.value_or(-1));
      directory =
          std::make_unique<RunDirectory>(path, options.attempt.value_or(next_attempt(path)));
    } catch (const ConfigError& error) {
      failure = std::string("C") + error.what();
    } catch (const std::exception& error) {
      failure = std::string("E") + error.what();
    }
  }
  failure = group.gather(failure).front();
  if (failure.empty()) return directory;
  if (failure.front() == 'C') throw ConfigError(failure.substr(1));
  throw EnvError(failure.substr(1));
}

// Room for the checkpoints that will lie side by side, before hours are spent.
void check_disk(const plan::Plan& plan, const Path& run_directory) {
  const int64_t kept = plan.resolved.checkpoint.keep_last + 1;
  int64_t present = 0;
  for (const checkpoint::CommittedStep& step :
       checkpoint::list_steps(run_directory / "checkpoints"))
    for (const auto& file : std::filesystem::directory_iterator(step.path))
      if (file.is_regular_file()) present += static_cast<int64_t>(file.file_size());
  const int64_t need = std::max<int64_t>(0, kept * plan.checkpoint_bytes - present),
                have = free_disk_bytes(run_directory);
  if (have < need)
    throw ConfigError(
        {.module = "trainer",
         .what = "making room for checkpoints in " + run_directory.string(),
         .got = format_bytes(have) + " free",
         .need = fmt::format("{} ({} checkpoints of {})", format_bytes(need), kept,
                             format_bytes(plan.checkpoint_bytes)),
         .fix =
             "Free some space, set run.directory to another disk, or lower checkpoint.keep_last"});
}

void announce(const plan::Plan& plan, const TrainOptions& options, const Path& run_directory) {
  const recipe::Recipe& r = plan.resolved;
  const plan::Grid::Sizes& g = plan.grid.sizes();
  if (!options.recipe.files.empty())
    log::info("trainer", "recipe {} -> {}", options.recipe.files.back().string(),
              (run_directory / "recipe.yaml").string());
  for (const std::string& choice : plan.choices) log::info("plan", "{}", choice);
  log::info("plan", "{} parameters, {} ranks (pp {}, dp {}, cp {}, tp {}), {} threads per rank",
            format_count(plan.model().parameters), plan.grid.size(), g.pp,
            plan.grid.data_parallel_size(), g.cp, g.tp, plan.threads_per_rank);
  log::info("plan", "{} tokens per step, {} micro-batches of {} x {} per rank, {} steps",
            plan.batch.tokens_per_step, plan.batch.micro_batches, plan.batch.micro_samples,
            plan.batch.sequence_length, plan.batch.total_steps);
  const plan::MemoryReport& m = plan.memory;
  log::info(
      "plan",
      "predicted peak per rank {}: parameters {}, gradients {}, optimizer {}, activations "
      "{}, workspace {}{}",
      format_bytes(m.run_peak()), format_bytes(m.parameters + m.master), format_bytes(m.gradients),
      format_bytes(m.optimizer), format_bytes(m.activations), format_bytes(m.workspace),
      r.run.device == "cuda" ? fmt::format("; {} on the GPU in all", format_bytes(m.needed()))
      : m.saving > m.peak()
          ? fmt::format("; {} in a step, the rest while a save is copied", format_bytes(m.peak()))
          : std::string());
  if (r.run.device == "cpu" &&
      plan.threads_per_rank * plan.topology.local_size > plan.topology.physical_cores)
    log::warning("trainer", "{} ranks x {} threads on {} cores: they will wait for one another",
                 plan.topology.local_size, plan.threads_per_rank, plan.topology.physical_cores);
}

// Steps above the resume point belong to a branch that is left: out of the way of saves and
// retention, but kept.
void set_newer_steps_aside(const ResumePoint& point, const RunDirectory& directory) {
  for (const checkpoint::CommittedStep& s :
       checkpoint::list_steps(directory.path() / "checkpoints")) {
    if (s.step <= point.scalars.step) continue;
    const Path aside = s.path.string() + fmt::format(".abandoned-{}", directory.attempt());
    if (rename_no_replace(s.path, aside))
      log::warning("trainer", "{} is newer than the step the run goes on from: moved to {}",
                   s.path.string(), aside.filename().string());
  }
}

// Not of a refused recipe or resume: nothing was started, and the directory keeps the report of the
// run that is in it.
void report_failure(const Path& run_directory, int rank, const std::exception& error) {
  const auto* own = dynamic_cast<const Error*>(&error);
  const std::string name = own != nullptr ? own->class_name() : "exception";
  const int code = own != nullptr ? own->run_exit_code() : exit_codes::kWorkerFailure;
  if (code == exit_codes::kUsage) return;
  launch::write_exit_report(run_directory, {.code = code,
                                            .cause = launch::cause_of_error(name),
                                            .error = name,
                                            .rank = rank,
                                            .worker_exit_code = code,
                                            .message = error.what()});
}

std::optional<TrainResult> already_finished(const std::optional<ResumePoint>& point,
                                            const plan::Plan& plan, const Path& run_directory) {
  if (!point || point->scalars.step < plan.batch.total_steps) return std::nullopt;
  log::info("trainer",
            "{} is finished: step {} of {}. To train longer raise run.steps (with --allow-change "
            "lr_schedule under a decaying schedule)",
            run_directory.string(), point->scalars.step, plan.batch.total_steps);
  return TrainResult{
      .exit_code = 0, .step = point->scalars.step, .run_directory = run_directory.string()};
}

// The device was opened before the recipe met its checkpoint, which may fix another one.
void check_device(const recipe::Run& run) {
  const std::string opened = device::accelerator() ? "cuda" : "cpu";
  if (run.device != "auto" && run.device != opened)
    throw ConfigError(ErrorText{.module = "trainer",
                                .what = "computing on " + opened,
                                .got = "a run whose run.device is " + run.device,
                                .need = run.device,
                                .why = "a resumed run stays on the device it began on",
                                .fix = opened == "cuda"
                                           ? "Set run.device: cpu"
                                           : "Go on where capstan doctor finds a GPU for every "
                                             "rank, or on CPUs with --set run.device=cpu "
                                             "--allow-change run.device"});
}

TrainResult train_in(const TrainOptions& options, const comm::Communicator& world,
                     const Path& path) {
  checkpoint::CommunicatorGroup group(world);
  const std::unique_ptr<RunDirectory> directory = open_run_directory(path, options, group);
  recipe::Resolved recipe = options.recipe;
  const std::optional<ResumePoint> point = find_resume_point(
      path, options.resume, checkpoint::parse_verify(recipe.recipe.checkpoint.verify), group);
  if (point) adopt_fixed_values(recipe.recipe, point->recipe);
  check_device(recipe.recipe.run);

  std::optional<text::Tokenizer> tokenizer;
  if (recipe.recipe.data.tokenizer)
    tokenizer = text::Tokenizer::load(*recipe.recipe.data.tokenizer);
  const plan::Plan plan = plan::make_plan(
      recipe, plan::local_topology(world.size(), options.local_size, recipe.recipe.run.device),
      {.tokenizer_vocab_size = tokenizer ? std::optional(tokenizer->vocab_size()) : std::nullopt});
  check_device(plan.resolved.run);
  if (device::accelerator() && plan.resolved.run.deterministic) device::compute_deterministically();
  plan::check_fp8_gpus(plan.resolved, probe_gpus().gpus);
  const std::string fingerprint = tokenizer ? tokenizer->fingerprint() : "";
  const data::TrainLoader loader(data::make_data_options(plan.resolved, fingerprint));
  if (point) check_same_run(*point, plan.resolved, loader.fingerprint(), options.allow_change);
  if (auto finished = already_finished(point, plan, path)) return *finished;
  if (world.rank() == 0) {
    check_disk(plan, path);
    if (point) set_newer_steps_aside(*point, *directory);
    std::error_code ignored;
    std::filesystem::remove(path / "exit.json", ignored);  // it told of the attempt before
    directory->write_recipe(recipe::dump_recipe(plan.resolved), plan::plan_json(plan));
    announce(plan, options, path);
  }

  device::set_threads(plan.threads_per_rank);
  mesh::Mesh mesh(world, plan.grid);
  engine::Engine engine(plan, mesh, {.gemm_file = (path / "products.txt").string()});
  if (point) {
    const checkpoint::HostState state(engine.state_entries());
    std::vector<checkpoint::StateBlob> blobs = state.blobs();
    (void)checkpoint::load_state(point->step, blobs);
    state.write_back();
    engine.restore(point->scalars);
    log::info("trainer", "resumed from {}: step {}", point->step.path.string(),
              point->scalars.step);
  }
  Loop loop({.options = options,
             .plan = plan,
             .loader = loader,
             .tokenizer_fingerprint = fingerprint,
             .run_directory = path,
             .resumed_step = point ? point->scalars.step : 0},
            engine, mesh);
  return loop.run();
}

}  // namespace

TrainResult train(const TrainOptions& options, const comm::Communicator& world) {
  world.set_timeout(options.recipe.recipe.run.start_timeout_s);
  const Path path = run_directory_of(options.recipe.recipe);
  try {
    TrainResult result = train_in(options, world, path);
    if (world.rank() == 0)
      launch::write_exit_report(path, {.code = result.exit_code,
                                       .cause = result.exit_code == 0 ? "done" : "preempted",
                                       .signal = result.stop_signal});
    return result;
  } catch (const comm::AbortedError&) {
    throw;  // another rank is the cause; who watches the ranks knows which
  } catch (const std::exception& error) {
    if (world.rank() == 0) report_failure(path, 0, error);
    throw;
  }
}

TrainResult train_as_threads(const TrainOptions& options, int nproc) {
  const recipe::Run& run = options.recipe.recipe.run;
  TrainResult first;
  try {
    comm::run_thread_ranks(nproc,
                           [&](const comm::Communicator& world) {
                             TrainResult result = train(options, world);
                             if (world.rank() == 0) first = std::move(result);
                           },
                           {.timeout_s = run.start_timeout_s,
                            .threads_per_rank = static_cast<int>(run.threads.value_or(1))});
  } catch (const comm::RankError& error) {
    try {
      std::rethrow_exception(error.cause());
    } catch (const std::exception& cause) {
      report_failure(run_directory_of(options.recipe.recipe), error.rank(), cause);
    }
    throw;
  }
  return first;
}

}  // namespace capstan::trainer
