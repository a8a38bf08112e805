// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// --device of the verbs that use a trained model in one process.
#pragma once
#include <CLI/CLI.hpp>

#include <string>

namespace capstan::cli {

void add_device_option(CLI::App& verb, std::string& device);

// auto takes the first visible GPU where there is one and the CUDA plug-in. Before LibTorch's first
// op. Throws ConfigError where cuda is asked for and cannot be, saying what is missing.
void start_device(const std::string& device);

}  // namespace capstan::cli
