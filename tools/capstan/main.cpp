// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// bin/capstan: the verbs that need no torch. The others are executed by
// libexec/capstan/capstan-run.
#include <cstring>

#include "program.h"
#include "train.h"
#include "verbs.h"

int main(int argc, char** argv) {
  using namespace capstan::cli;
  for (const VerbName& verb : run_verbs())
    if (argc > 1 && std::strcmp(argv[1], verb.name) == 0)
      return guard([&]() -> int { exec_capstan_run(argc, argv); });

  CLI::App app("Capstan pretrains large language models and adapts them.", "capstan");
  frame(app);
  add_train_launcher(app, argc, argv);
  add_plan(app);
  add_data(app);
  add_recipe(app);
  for (const VerbName& verb : run_verbs())  // reached when an option stands before the verb
    app.add_subcommand(verb.name, verb.summary)->prefix_command()->callback([&] {
      exec_capstan_run(argc, argv);
    });
  add_doctor(app);
  app.footer("Start with: capstan recipe list, capstan plan quickstart, capstan train quickstart");
  return run(app, argc, argv);
}
