// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/recorder.h"

#include <atomic>
#include <mutex>

#include "capstan/base/log.h"
#include "capstan/metrics/rate.h"
#include "capstan/metrics/step_line.h"
#include "capstan/metrics/tensorboard.h"

namespace capstan::metrics {

namespace {

const char* level_name(log::Level level) {
  return level == log::Level::kError ? "error" : level == log::Level::kWarning ? "warning" : "info";
}

bool is_console_terminal(std::FILE* console) {
  return console != nullptr && is_terminal(::fileno(console));
}

}  // namespace

struct Recorder::State {
  explicit State(RecorderOptions chosen)
      : options(std::move(chosen)),
        file(options.run_directory / "metrics.jsonl"),
        pacer({.terminal = is_console_terminal(options.console),
               .interval_steps = options.interval_steps,
               .clock_s = options.clock_s}) {
    if (options.tensorboard) {
      tensorboard = std::make_unique<TensorboardWriter>(options.run_directory / "tensorboard");
    }
    color = options.console != nullptr && wants_color(::fileno(options.console));
  }

  void print(const StepRecord& record) {
    StepLine line{.step = record.step,
                  .total_steps = options.total_steps,
                  .loss = record.loss,
                  .grad_norm = record.grad_norm,
                  .lr = record.lr,
                  .step_ms = record.step_ms,
                  .tokens_per_s = record.tokens_per_s,
                  .world_size = options.world_size,
                  .mfu = record.mfu,
                  .skipped = record.skipped};
    if (record.peak_bytes > 0) line.peak_bytes = record.peak_bytes;
    if (options.total_steps > 0) line.eta_s = rate.eta_s(options.total_steps - record.step);
    const std::string text = format_step_line(line, color) + "\n";
    // A console that went away (closed terminal, full disk) is no reason to stop.
    (void)std::fwrite(text.data(), 1, text.size(), options.console);
    (void)std::fflush(options.console);
  }

  void plot(const StepRecord& record) {
    const auto put = [&](const char* tag, double value) {
      tensorboard->add_scalar(tag, value, record.step);
    };
    put("train/loss", record.loss);
    put("train/grad_norm", record.grad_norm);
    put("train/lr", record.lr);
    if (record.loss_scale) put("train/loss_scale", *record.loss_scale);
    if (record.experts) {
      put("experts/load", record.experts->load);
      put("experts/dropped", record.experts->dropped);
      put("experts/auxiliary_loss", record.experts->auxiliary_loss);
      put("experts/z_loss", record.experts->z_loss);
    }
    put("speed/step_ms", record.step_ms);
    put("speed/data_wait_ms", record.data_wait_ms);
    put("speed/tokens_per_s", record.tokens_per_s);
    if (record.mfu) put("speed/mfu", *record.mfu);
    put("memory/peak_bytes", static_cast<double>(record.peak_bytes));
    put("memory/rss_bytes", static_cast<double>(record.rss_bytes));
  }

  static void on_log(void* context, log::Level level, std::string_view module,
                     std::string_view text) {
    auto& state = *static_cast<State*>(context);
    state.file.write(EventRecord{.step = state.last_step.load(),
                                 .level = level_name(level),
                                 .module = std::string(module),
                                 .text = std::string(text)});
  }

  RecorderOptions options;
  MetricsFile file;
  LinePacer pacer;
  std::unique_ptr<TensorboardWriter> tensorboard;
  RateMeter rate;
  bool color = false, seen_step = false, observing = false;
  std::atomic<int64_t> last_step{0};
  mutable std::mutex mutex;  // of pacer, rate, seen_step
};

Recorder::Recorder(RecorderOptions options) : state_(std::make_unique<State>(std::move(options))) {}

Recorder::~Recorder() {
  if (state_->observing) log::set_observer(nullptr, nullptr);
}

int Recorder::attempt() const { return state_->file.attempt(); }

void Recorder::start(const StartRecord& record) {
  state_->last_step = record.resumed_step;
  state_->file.write(record);
  if (state_->tensorboard) {
    StartRecord shown = record;
    shown.attempt = attempt();
    state_->tensorboard->add_text("run/start", "```\n" + to_json(shown) + "\n```",
                                  record.resumed_step);
  }
}

void Recorder::step(const StepRecord& record, bool is_last) {
  const std::lock_guard lock(state_->mutex);
  state_->last_step = record.step;
  state_->rate.add(record.step_ms / 1000.0, record.target_tokens);
  const bool first = !std::exchange(state_->seen_step, true);
  const int64_t interval = state_->options.interval_steps;
  const bool on_interval = interval > 0 && record.step % interval == 0;
  const bool print = state_->pacer.should_print(record.step, is_last || record.skipped.has_value());
  if (print && state_->options.console != nullptr) state_->print(record);
  if (!first && !is_last && !on_interval && !record.skipped) return;
  state_->file.write(record);
  if (state_->tensorboard) state_->plot(record);
}

void Recorder::evaluation(const EvalRecord& record) {
  state_->file.write(record);
  if (!state_->tensorboard) return;
  const std::string prefix = "eval/" + record.set + "/";
  state_->tensorboard->add_scalar(prefix + "loss", record.loss, record.step);
  state_->tensorboard->add_scalar(prefix + "perplexity", record.perplexity, record.step);
  if (record.bits_per_byte) {
    state_->tensorboard->add_scalar(prefix + "bits_per_byte", *record.bits_per_byte, record.step);
  }
}

void Recorder::checkpoint(const CheckpointRecord& record) { state_->file.write(record); }
void Recorder::event(const EventRecord& record) { state_->file.write(record); }

void Recorder::end(const EndRecord& record) {
  state_->file.write(record);
  state_->file.sync();
}

void Recorder::observe_log() {
  state_->observing = true;
  log::set_observer(&State::on_log, state_.get());
}

int64_t Recorder::dropped() const {
  return state_->file.dropped() + (state_->tensorboard ? state_->tensorboard->dropped() : 0);
}

std::optional<double> Recorder::eta_s() const {
  const std::lock_guard lock(state_->mutex);
  if (state_->options.total_steps <= 0) return std::nullopt;
  return state_->rate.eta_s(state_->options.total_steps - state_->last_step.load());
}

}  // namespace capstan::metrics
