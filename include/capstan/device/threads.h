// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How many threads a rank computes with.
#pragma once

namespace capstan::device {

// Threads of LibTorch's kernels that are called from this thread (the setting is per thread); one
// thread between operations. To be called before anything is computed by several threads: the first
// functions of MKL's vector math are called here, on one. Throws ConfigError below 1.
void set_threads(int count);
[[nodiscard]] int threads();
// Physical cores this process may use / ranks on this machine, at least 1.
[[nodiscard]] int recommended_threads(int local_ranks);

}  // namespace capstan::device
