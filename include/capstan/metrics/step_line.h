// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The line a person watches, and when to print it.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace capstan::metrics {

struct StepLine {
  int64_t step = 0, total_steps = 0;  // total 0 = open end
  double loss = 0, grad_norm = 0, lr = 0, step_ms = 0, tokens_per_s = 0;
  int world_size = 1;
  std::optional<double> mfu;  // 0..1
  std::optional<int64_t> peak_bytes;
  std::optional<double> eta_s;
  std::optional<std::string> skipped;
};
// "step    120/900 | loss 5.0493 | norm 1.204 | lr 2.87e-03 | 271 ms | 7557 tok/s | ..."
// (docs/metrics.md). Parts that are not known are left out. `color` marks a skipped step.
[[nodiscard]] std::string format_step_line(const StepLine& line, bool color = false);

// Also true for standard output that the launcher copies to a terminal (CAPSTAN_CONSOLE=terminal).
[[nodiscard]] bool is_terminal(int descriptor);
// A terminal that may get colour: NO_COLOR unset or empty, TERM not "dumb".
[[nodiscard]] bool wants_color(int descriptor);

// On a terminal every interval_steps; elsewhere the same lines at most every quiet_s seconds. The
// first and the last step of an attempt are always printed.
class LinePacer {
 public:
  struct Options {
    bool terminal = false;
    int64_t interval_steps = 10;
    double quiet_s = 10;
    std::function<double()> clock_s;  // monotonic seconds; empty = the system's
  };
  explicit LinePacer(Options options);
  // To be asked once per finished step, in order.
  [[nodiscard]] bool should_print(int64_t step, bool is_last);

 private:
  Options options_;
  std::optional<double> last_print_s_;
};

}  // namespace capstan::metrics
