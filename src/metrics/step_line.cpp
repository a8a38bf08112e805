// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/step_line.h"

#include <fmt/format.h>
#include <unistd.h>

#include "capstan/base/bytes.h"
#include "capstan/base/env.h"

namespace capstan::metrics {

namespace {

std::string format_ms(double ms) { return fmt::format("{:.{}f} ms", ms, ms < 9.95 ? 2 : 0); }

}  // namespace

std::string format_step_line(const StepLine& line, bool color) {
  std::string out = fmt::format("step {:>6}", line.step);
  if (line.total_steps > 0) out += fmt::format("/{}", line.total_steps);
  out += fmt::format(" | loss {:.4f} | norm {:#.4g} | lr {:.2e} | {} | {:.0f} tok/s", line.loss,
                     line.grad_norm, line.lr, format_ms(line.step_ms), line.tokens_per_s);
  if (line.world_size > 1) {
    out += fmt::format(" | {:.0f} tok/s/rank", line.tokens_per_s / line.world_size);
  }
  if (line.mfu) out += fmt::format(" | MFU {:.1f}%", *line.mfu * 100);
  if (line.peak_bytes) {
    out += fmt::format(" | peak {:.2f} GiB", static_cast<double>(*line.peak_bytes) / kGiB);
  }
  if (line.eta_s) out += " | ETA " + format_duration(*line.eta_s);
  if (line.skipped) {
    const std::string text = "skipped: " + *line.skipped;
    out += " | " + (color ? "\x1b[33m" + text + "\x1b[0m" : text);
  }
  return out;
}

bool is_terminal(int descriptor) {
  if (::isatty(descriptor) == 1) return true;
  // Rank 0 prints into a pipe of the launcher, which says so when the other end is a terminal.
  return descriptor == STDOUT_FILENO && read_env("CAPSTAN_CONSOLE") == "terminal";
}

bool wants_color(int descriptor) {
  if (!read_env("NO_COLOR").value_or("").empty()) return false;
  return is_terminal(descriptor) && read_env("TERM").value_or("dumb") != "dumb";
}

LinePacer::LinePacer(Options options) : options_(std::move(options)) {
  if (!options_.clock_s)
    options_.clock_s = [] { return static_cast<double>(monotonic_ns()) / 1e9; };
}

bool LinePacer::should_print(int64_t step, bool is_last) {
  const double now = options_.clock_s();
  const bool first = !last_print_s_;
  const bool on_interval = options_.interval_steps > 0 && step % options_.interval_steps == 0;
  const bool rested = options_.terminal || first || now - *last_print_s_ >= options_.quiet_s;
  const bool print = first || is_last || (on_interval && rested);
  if (print) last_print_s_ = now;
  return print;
}

}  // namespace capstan::metrics
