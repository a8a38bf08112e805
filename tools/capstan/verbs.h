// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The verbs of the command line. Each function adds one subcommand with its help, example and
// callback.
#pragma once
#include <CLI/CLI.hpp>

namespace capstan::cli {

// Thrown by a verb to end the program with a code after it has printed what it had to say.
struct Exit {
  int code;
};

// Linked into bin/capstan (no torch).
void add_plan(CLI::App& app);
void add_data(CLI::App& app);    // tokenizer train|import, prepare, inspect
void add_recipe(CLI::App& app);  // list, show, validate, schema
void add_doctor(CLI::App& app);

// data's parts, each in a file of its own.
void add_data_tokenizer(CLI::App& data);
void add_data_prepare(CLI::App& data);
void add_data_inspect(CLI::App& data);

// Linked into libexec/capstan/capstan-run.
void add_train(CLI::App& app);
void add_eval(CLI::App& app);
void add_generate(CLI::App& app);
void add_checkpoint(CLI::App& app);  // inspect, verify
void add_prove(CLI::App& app);

}  // namespace capstan::cli
