// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How many threads a rank computes with.
#pragma once

namespace capstan::device {

// Threads of LibTorch's kernels that are called from this thread (the setting is per thread); one
// thread between operations. Prepares vector math. Throws ConfigError below 1.
void set_threads(int count);
// Once per process, before several threads compute: functions of MKL's vector math find their code
// in the first call, and when several threads are in it, some compute at low accuracy. set_threads,
// comm::run_thread_ranks and the engine call it.
void prepare_vector_math();
[[nodiscard]] int threads();
// Physical cores this process may use / ranks on this machine, at least 1.
[[nodiscard]] int recommended_threads(int local_ranks);

}  // namespace capstan::device
