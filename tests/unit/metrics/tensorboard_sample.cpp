// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Writes a small event file into the folder given as argument, for read_events.py.
#include <cstdio>
#include <vector>

#include "capstan/metrics/tensorboard.h"

int main(int count, char** arguments) {
  if (count != 2) {
    std::fputs("usage: capstan_tensorboard_sample FOLDER\n", stderr);
    return 2;
  }
  capstan::metrics::TensorboardWriter writer(arguments[1]);
  for (int step = 1; step <= 3; ++step) writer.add_scalar("train/loss", 8.0 / step, step);
  writer.add_text("run/start", "two words", 0);
  const std::vector<float> values = {-1.0f, 0.5f, 0.5f, 4.0f};
  writer.add_histogram("grad", capstan::metrics::make_histogram(values), 3);
  return writer.dropped() == 0 ? 0 : 1;
}
