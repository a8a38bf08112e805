// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "trainer/loop.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <mutex>
#include <numeric>

#include "capstan/base/bytes.h"
#include "capstan/base/console.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/gpu.h"
#include "capstan/base/log.h"
#include "capstan/device/accelerator.h"
#include "capstan/device/allocator.h"
#include "capstan/device/isa.h"
#include "capstan/device/matmul_peak.h"
#include "capstan/launch/run_folder.h"
#include "capstan/trainer/batches.h"
#include "capstan/trainer/evaluate.h"
#include "capstan/trainer/run_directory.h"
#include "capstan/trainer/stop.h"
#include "trainer/resume.h"

namespace capstan::trainer {
namespace {

double ms_since(int64_t begin_ns) { return static_cast<double>(monotonic_ns() - begin_ns) * 1e-6; }

std::optional<metrics::ExpertRecord> summarize(const std::vector<parallel::ExpertLoad>& layers) {
  if (layers.empty()) return std::nullopt;
  metrics::ExpertRecord record;
  double dropped = 0, choices = 0;
  const double count = static_cast<double>(layers.size());
  for (const parallel::ExpertLoad& layer : layers) {
    record.load = std::max(record.load, layer.max_over_mean());
    dropped += layer.dropped;
    choices += std::accumulate(layer.tokens.begin(), layer.tokens.end(), 0.0);
    record.auxiliary_loss += layer.auxiliary_loss / count;
    record.z_loss += layer.z_loss / count;
  }
  record.dropped = choices > 0 ? dropped / choices : 0;
  return record;
}

std::vector<int> all_ranks(const comm::Communicator& world) {
  std::vector<int> ranks(static_cast<size_t>(world.size()));
  for (int r = 0; r < world.size(); ++r) ranks[static_cast<size_t>(r)] = r;
  return ranks;
}

std::unique_ptr<checkpoint::CommitGroup> make_commit_group(const comm::Communicator& world) {
  return std::make_unique<checkpoint::CommunicatorGroup>(
      world.split("checkpoint", all_ranks(world)));
}

// A checkpoint is used without the folders of its training.
void add_tokenizer_files(const recipe::Data& data, checkpoint::SaveRequest& request) {
  if (!data.tokenizer) return;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json"}) {
    const Path given = *data.tokenizer;
    const Path file = (std::filesystem::is_directory(given) ? given : given.parent_path()) / name;
    if (std::filesystem::exists(file)) request.files.emplace_back(name, read_file(file));
  }
}

// Spans of other threads may still hold a collector when its window ends, so collectors live as
// long as the process.
metrics::TraceCollector& new_collector() {
  static std::mutex mutex;
  static auto* all = new std::deque<metrics::TraceCollector>;
  const std::lock_guard lock(mutex);
  return all->emplace_back();
}

}  // namespace

int64_t peak_bytes_of(int rank) {
  const device::Accelerator* const gpu = device::accelerator();
  return gpu ? gpu->memory().peak_bytes : device::stats(rank).peak_bytes;
}

// FLOP/s of this rank's processor; 0 = unknown. CPUs are measured, all ranks at the same time, as
// they will compute; GPUs have a data sheet.
double peak_flops_of(const plan::Plan& plan, int rank) {
  if (device::Accelerator* const gpu = device::accelerator()) {
    gpu->reset_peak();
    const auto index = static_cast<size_t>(gpu->device().index());
    const auto& gpus = probe_gpus().gpus;
    const std::string name = index < gpus.size() ? gpus[index].name : "";
    const double flops = dense_flops(name, plan.precision.compute).value_or(0);
    if (rank == 0)
      log::info("metrics", "MFU is against {} ({}, {}), {:.3g} FLOPs per token (causal)",
                flops > 0 ? fmt::format("{:.0f} TFLOP/s dense", flops * 1e-12) : "nothing: n/a",
                name.empty() ? "unknown GPU" : name, name_of(plan.precision.compute),
                plan.flops.per_token);
    return flops;
  }
  const double flops =
      1e9 * device::measure_matmul_peak(plan.precision.compute, plan.threads_per_rank);
  device::reset_peak(rank);  // what the measurement took is no part of the step
  if (rank == 0)
    log::info("metrics",
              "MFU is against a measured matmul peak of {:.0f} GFLOP/s per rank ({}, {}), {:.3g} "
              "FLOPs per token (causal)",
              flops * 1e-9, name_of(plan.precision.compute), device::name_of(device::isa_level()),
              plan.flops.per_token);
  return flops;
}

// Largest stop signal and peak memory over all ranks. Issued before a step and read after it, so it
// costs no wait: all ranks see a request at the same step.
class Loop::Agreement {
 public:
  Agreement(const comm::Communicator& world, int rank)
      : values_(at::tensor(std::vector<int64_t>{stop_signal(), peak_bytes_of(rank)}, at::kLong)),
        work_(world.control().all_reduce(values_, comm::ReduceOp::kMax)) {}
  Agreed wait() {
    work_.wait();
    const int64_t* v = values_.data_ptr<int64_t>();
    return {static_cast<int>(v[0]), v[1]};
  }

 private:
  at::Tensor values_;
  comm::Work work_;
};

Loop::Loop(LoopInputs inputs, engine::Engine& engine, mesh::Mesh& mesh)
    : in_(std::move(inputs)),
      engine_(engine),
      mesh_(mesh),
      saver_(
          make_commit_group(mesh.world()),
          {in_.plan.resolved.checkpoint.keep_last, in_.plan.resolved.checkpoint.keep_every_steps},
          in_.plan.resolved.checkpoint.asynchronous),
      documents_(data::parse_documents(in_.plan.resolved.data.documents)),
      step_(engine.scalars().step) {
  open_validation();
  start_records();
}

bool Loop::is_due(const std::optional<int64_t>& interval) const {
  return interval && step() % *interval == 0;
}

void Loop::open_validation() {
  for (const recipe::ValidationSource& source : in_.plan.resolved.data.validation)
    validation_.emplace_back(
        data::ValidationOptions{.name = source.name,
                                .path = source.path,
                                .sequence_length = in_.plan.batch.sequence_length,
                                .documents = documents_,
                                .vocab_size = in_.plan.model().shape.vocab_size,
                                .tokenizer_fingerprint = in_.tokenizer_fingerprint});
}

void Loop::start_records() {
  const plan::Plan& plan = in_.plan;
  peak_flops_per_rank_ = peak_flops_of(plan, mesh_.rank());
  started_ns_ = monotonic_ns();
  if (!is_first()) return;
  recorder_ = std::make_unique<metrics::Recorder>(
      metrics::RecorderOptions{.run_directory = in_.run_directory,
                               .interval_steps = plan.resolved.metrics.interval_steps,
                               .total_steps = plan.batch.total_steps,
                               .world_size = mesh_.world().size(),
                               .tensorboard = plan.resolved.metrics.tensorboard,
                               .console = in_.options.console ? stdout : nullptr});
  recorder_->observe_log();
  recorder_->start({.run = plan.resolved.run.name,
                    .version = "capstan " CAPSTAN_VERSION,
                    .world_size = mesh_.world().size(),
                    .device = plan.resolved.run.device,
                    .recipe_xxh3 = recipe::identity_hash(plan.resolved),
                    .parameters = plan.model().parameters,
                    .flops_per_token = plan.flops.per_token,
                    .flops_convention = plan.flops.convention,
                    .predicted_peak_bytes = plan::largest_run_peak(plan),
                    .resumed_step = in_.resumed_step});
}

void Loop::start_step(data::Prefetcher& prefetcher) {
  static const std::unique_ptr<engine::Objective> objective = engine::make_next_token_objective();
  Agreement agreement(mesh_.world(), mesh_.rank());
  Started started{.begin_ns = monotonic_ns()};
  const data::SampleBatch batch = prefetcher.next();
  started.wait_ms = prefetcher.wait_ms();
  engine_.start_step(split_batch(batch, in_.plan.batch.micro_samples, documents_), *objective);
  started_.push_back(started);
  ++step_;
  agreed_ = agreement.wait();
}

// A step that waited for the one before lasts from that one's end.
void Loop::finish_step() {
  const engine::StepReport report = engine_.finish_step();
  const Started started = started_.front();
  started_.pop_front();
  record_step(report, ms_since(std::max(started.begin_ns, reported_ns_)), started.wait_ms);
  reported_ns_ = monotonic_ns();
  if (in_.options.on_step) in_.options.on_step(report.step, report.loss);
}

void Loop::finish_steps(int64_t left) {
  while (engine_.unreported_steps() > left) finish_step();
}

// Before what needs the scalars or the weights of this step, and after the first: its report is
// the first sign that all is well.
bool Loop::needs_all_reports() const {
  const recipe::Recipe& recipe = in_.plan.resolved;
  return !engine_.reports_late() || reported_ns_ == 0 || agreed_.stop_signal != 0 ||
         step() == in_.plan.batch.total_steps || is_due(recipe.eval.interval_steps) ||
         is_due(recipe.checkpoint.interval_steps);
}

void Loop::record_step(const engine::StepReport& report, double step_ms, double wait_ms) {
  last_loss_ = report.loss;
  if (!recorder_) return;
  metrics::StepRecord record;
  record.step = report.step;
  record.tokens = report.tokens;
  record.samples = report.samples;
  record.loss = report.loss;
  record.grad_norm = report.grad_norm;
  record.lr = report.lr;
  record.step_ms = step_ms;
  record.data_wait_ms = wait_ms;
  record.tokens_per_s = metrics::tokens_per_second(in_.plan.batch.tokens_per_step, step_ms);
  record.mfu = metrics::model_flops_utilisation(in_.plan.flops.per_token, record.tokens_per_s,
                                                peak_flops_per_rank_, mesh_.world().size());
  record.peak_bytes = agreed_.peak_bytes;
  record.rss_bytes = resident_bytes();
  record.target_tokens = report.target_tokens;
  if (!report.skipped.empty()) record.skipped = report.skipped;
  record.loss_scale = report.loss_scale;
  record.experts = summarize(report.experts);
  record.elapsed_s = ms_since(started_ns_) * 1e-3;
  recorder_->step(record, report.step == in_.plan.batch.total_steps);
}

void Loop::evaluate_all() {
  if (last_evaluated_step_ == step()) return;
  last_evaluated_step_ = step();
  for (const data::ValidationSet& set : validation_) {
    const EvalResult result =
        evaluate(engine_, mesh_, set, documents_, {.samples = in_.plan.resolved.eval.samples});
    if (!recorder_) continue;
    recorder_->evaluation({.step = step(),
                           .set = result.set,
                           .loss = result.loss,
                           .perplexity = result.perplexity,
                           .bits_per_byte = result.bits_per_byte,
                           .target_tokens = result.target_tokens});
    log::info(
        "eval", "step {} | {} loss {:.4f} | perplexity {:.1f}{}", step(), result.set, result.loss,
        result.perplexity,
        result.bits_per_byte ? fmt::format(" | {:.3f} bits/byte", *result.bits_per_byte) : "");
  }
}

void Loop::save(bool wait) {
  report_save(saver_.wait(), false);
  if (last_saved_step_ != step()) {
    const checkpoint::HostState state(engine_.state_entries());
    checkpoint::SaveRequest request{.directory = in_.run_directory / "checkpoints",
                                    .step = step(),
                                    .state = state.blobs(),
                                    .recipe_identity = recipe::identity_hash(in_.plan.resolved)};
    if (is_first()) {
      request.files = {
          {"recipe.yaml", recipe::dump_recipe(in_.plan.resolved)},
          {"config.json", plan::to_hf_config(in_.plan.model().shape, in_.plan.precision.master)},
          {"state.json", state_text(engine_.scalars(), in_.loader.fingerprint())}};
      add_tokenizer_files(in_.plan.resolved.data, request);
      request.layout = {{"world_size", std::to_string(mesh_.world().size())},
                        {"device", in_.plan.resolved.run.device},
                        {"threads_per_rank", std::to_string(in_.plan.threads_per_rank)},
                        {"isa", std::string(device::name_of(device::isa_level()))},
                        {"parameters", std::to_string(in_.plan.model().parameters)}};
    }
    last_saved_step_ = step();
    saver_.start(std::move(request));
  }
  if (wait) report_save(saver_.wait(), true);
}

void Loop::report_save(const std::optional<checkpoint::SaveOutcome>& outcome, bool must_succeed) {
  if (!outcome) return;
  const bool ok = outcome->error.empty();
  if (recorder_)
    recorder_->checkpoint({.step = outcome->step,
                           .path = "checkpoints/" + checkpoint::step_folder_name(outcome->step),
                           .bytes = outcome->bytes,
                           .stall_ms = outcome->stall_ms,
                           .commit_ms = outcome->commit_ms,
                           .ok = ok,
                           .error = ok ? std::nullopt : std::optional(outcome->error)});
  if (ok) {
    if (is_first())
      log::info("checkpoint", "saved {} ({}, {:.0f} ms)", outcome->path.string(),
                format_bytes(outcome->bytes), outcome->stall_ms + outcome->commit_ms);
    return;
  }
  last_saved_step_ = -1;
  if (must_succeed) throw EnvError(outcome->error);
  if (is_first())
    log::error("checkpoint", "step {} was not saved: {}", outcome->step, outcome->error);
}

// One collector per process: with ranks as threads, rank 0's.
void Loop::update_trace() {
  const recipe::Trace& trace = in_.plan.resolved.metrics.trace;
  if (!trace.first_step || (mesh_.world().backend_name() == "threads" && !is_first())) return;
  if (step() + 1 == *trace.first_step) {
    tracer_ = &new_collector();
    trace::set_sink(tracer_);
  } else if (step() + 1 >= *trace.first_step + trace.steps) {
    end_trace();
  }
}

void Loop::end_trace() {
  if (tracer_ == nullptr) return;
  trace::set_sink(nullptr);
  const int64_t first_step = in_.plan.resolved.metrics.trace.first_step.value_or(0);
  for (const Path& file : tracer_->write(in_.run_directory, first_step, mesh_.rank()))
    log::info("metrics", "trace written to {}", file.string());
  tracer_ = nullptr;
}

Loop::~Loop() { end_trace(); }

TrainResult Loop::run() {
  const recipe::Recipe& recipe = in_.plan.resolved;
  const int64_t ranks = mesh_.grid().data_parallel_size(),
                mine = mesh_.grid().data_parallel_index(mesh_.rank());
  const data::StepSchedule samples(in_.plan.batch.global_samples);
  data::Prefetcher prefetcher(
      [&](int64_t at_step) {
        const data::SampleRange all{samples.samples_before(at_step), samples.samples_in(at_step)};
        return in_.loader.read_padded(data::share_of(all, mine, ranks),
                                      in_.plan.batch.samples_per_rank);
      },
      {.first_step = step(),
       .end_step = in_.plan.batch.total_steps,
       .timeout_s = recipe.run.step_timeout_s});
  bool first = true;
  while (step() < in_.plan.batch.total_steps) {
    update_trace();
    start_step(prefetcher);
    finish_steps(needs_all_reports() ? 0 : 1);
    if (std::exchange(first, false)) mesh_.world().set_timeout(recipe.run.step_timeout_s);
    report_save(saver_.poll(), false);
    if (agreed_.stop_signal != 0 && step() < in_.plan.batch.total_steps) {
      if (is_first())
        tell(fmt::format("{}: saving step {}; Ctrl-C again stops at once\n",
                         launch::signal_name(agreed_.stop_signal), step()));
      save(true);
      return finish(exit_codes::kPreempted);
    }
    if (is_due(recipe.eval.interval_steps)) evaluate_all();
    if (is_due(recipe.checkpoint.interval_steps)) save(false);
  }
  update_trace();
  evaluate_all();
  save(true);
  return finish(exit_codes::kDone);
}

TrainResult Loop::finish(int exit_code) {
  // The last step and save have come since.
  const int64_t counted = Agreement(mesh_.world(), mesh_.rank()).wait().peak_bytes;
  if (is_first()) {
    log::info("metrics", "{}",
              metrics::format_memory({.predicted_peak_bytes = plan::largest_run_peak(in_.plan),
                                      .counted_peak_bytes = counted,
                                      .resident_peak_bytes = resident_bytes()}));
    recorder_->end(
        {.step = step(), .exit = exit_code, .cause = exit_code == 0 ? "done" : "preempted"});
    if (exit_code == exit_codes::kPreempted && !in_.options.resume_command.empty())
      tell(fmt::format("step {} is saved. To go on: {}\n", step(), in_.options.resume_command));
  }
  return {.exit_code = exit_code,
          .step = step(),
          .loss = last_loss_,
          .stop_signal = exit_code == exit_codes::kPreempted ? agreed_.stop_signal : 0,
          .run_directory = in_.run_directory.string()};
}

}  // namespace capstan::trainer
