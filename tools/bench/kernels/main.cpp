// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// capstan_kernels_bench: us, GB/s and the ratio to a device copy for every kernel at training
// sizes. GB/s counts the bytes that a kernel must move, not what it does move. What works on few
// numbers (fp8_scale, rescale_sums, finish_stats, decide_step) shows what a launch takes.
#include <fmt/core.h>

#include "capstan/base/error.h"
#include "cases.h"
#include "timing.h"

int main() {
  using namespace capstan;
  try {
    const std::string device = bench::device_name();
    fmt::print("{}, device copy {:.0f} GB/s\n", device, bench::copy_rate() / 1e9);
    fmt::print("{:<24}{:<44}{:>10}{:>10}{:>8}\n", "kernel", "shape", "us", "GB/s", "ratio");
    bench::run_all();
  } catch (const Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.exit_code();
  }
  return 0;
}
