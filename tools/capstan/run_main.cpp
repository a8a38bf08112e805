// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// libexec/capstan/capstan-run: the verbs that compute. Started by bin/capstan, by a launcher, or by
// hand.
#include "capstan/device/allocator.h"
#include "program.h"
#include "train.h"
#include "verbs.h"

int main(int argc, char** argv) {
  using namespace capstan::cli;
  capstan::device::install_cpu_allocator();
  CLI::App app("The computing half of capstan; users type `capstan VERB`.", "capstan");
  frame(app);
  add_train(app);
  add_eval(app);
  add_generate(app);
  add_checkpoint(app);
  add_prove(app);
  return run(app, argc, argv);
}
