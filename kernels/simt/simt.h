// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs kernels on the host as a GPU might, to find errors without one. Blocks run one after another
// and the threads of a block as fibers that change at barriers. The order of both can be shuffled;
// dynamic shared memory starts as NaN in each block. Found and thrown as InternalError, naming the
// kernel, block, thread and source line:
//   - barriers and warp operations that not all threads of the block or warp reach, or that they
//     reach at different lines;
//   - vectors at addresses that are no multiple of their alignment;
//   - writes past dynamic shared memory, stack overflow of a thread.
// Of statically shared arrays there is one for all blocks. One launch at a time in a process.
#pragma once
#include <cstdint>
#include <functional>

#include "../config.h"

namespace capstan::kernels::simt {

// 0: ascending; else a permutation that the seed decides, new for each turn.
void set_order(uint64_t seed);

void run_grid(const char* kernel, const LaunchShape& shape, const std::function<void()>& thread);

// Called by threads, through platform.h.
void sync_block(int line);
// Waits for the 32 lanes of the warp; what each of them brought, until the lane's next call.
const uint64_t* exchange_words(uint32_t mask, uint64_t word, int line);
[[nodiscard]] void* dynamic_shared();
[[noreturn]] void fail_thread(const char* why);

}  // namespace capstan::kernels::simt
