// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The trainer as a library: one rank, a recipe from a file, a callback after every step.
// usage: embed_trainer RECIPE [KEY=VALUE ...]
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#include "capstan/device/allocator.h"
#include "capstan/trainer/stop.h"
#include "capstan/trainer/train.h"

int main(int argc, char** argv) {
  using namespace capstan;
  if (argc < 2) {
    std::fprintf(stderr, "usage: embed_trainer RECIPE [KEY=VALUE ...]\n");
    return 2;
  }
  device::install_cpu_allocator();          // before the first tensor
  const trainer::StopSignals stop_signals;  // Ctrl-C saves and returns exit code 90
  try {
    const std::vector<std::string> overrides(argv + 2, argv + argc);
    trainer::TrainOptions options;
    options.recipe = recipe::load_recipe(recipe::find_recipe(argv[1]), overrides);
    options.console = false;
    options.on_step = [](int64_t step, double loss) {
      std::printf("step %lld loss %.4f\n", static_cast<long long>(step), loss);
    };
    const trainer::TrainResult result =
        trainer::train(options, comm::Communicator());  // a communicator of one rank
    std::printf("ended at step %lld in %s\n", static_cast<long long>(result.step),
                result.run_directory.c_str());
    return result.exit_code;
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.run_exit_code();
  }
}
