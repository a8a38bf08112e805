// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What both programs share: the frame of a command line, and the way from an exception to an exit
// code.
#pragma once
#include <CLI/CLI.hpp>

#include <functional>
#include <string>
#include <vector>

namespace capstan::cli {

struct VerbName {
  const char* name;
  const char* summary;
};
// Verbs of this build in the order of the help, with the program that runs them.
[[nodiscard]] const std::vector<VerbName>& base_verbs();   // bin/capstan
[[nodiscard]] const std::vector<VerbName>& run_verbs();    // libexec/capstan/capstan-run
[[nodiscard]] const std::vector<VerbName>& later_verbs();  // known, refused by name

[[nodiscard]] std::string version_text();
// Adds --version and --log-level and the text at the end of the help.
void frame(CLI::App& app);

// Parses and runs; prints errors to stderr, and returns the exit code.
int run(CLI::App& app, int argc, char** argv);
// Runs body; every exception becomes a line on stderr and a code. `inside_run` picks the codes of a
// run.
int guard(const std::function<int()>& body, bool inside_run = false);

// Replaces this process by capstan-run with the same arguments. Returns only by throwing EnvError.
[[noreturn]] void exec_capstan_run(int argc, char** argv);
[[nodiscard]] std::string capstan_run_path();

}  // namespace capstan::cli
