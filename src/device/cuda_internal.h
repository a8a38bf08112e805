// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// start_cuda() without a look at the machine.
#pragma once
#include <string>

namespace capstan::device {

// Loads the plug-in and lets it install what it has. Throws EnvError saying what is wrong with the
// file or with the order of things.
void open_cuda_plugin(const std::string& path);

}  // namespace capstan::device
