// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The CPU allocator of every tensor: caches freed blocks by size class, aligns blocks from 1 MiB up
// to 2 MiB and asks for huge pages, and counts what it has handed out per rank. Sizes are rounded
// up by at most 12.5 %. A block is charged to the rank of the thread that allocated it
// (log::thread_rank(), else the default rank) until it is freed, by whatever thread. All functions
// are thread-safe.
#pragma once
#include <cstdint>

namespace capstan::device {

struct MemoryStats {
  int64_t current_bytes = 0;  // handed out, after size rounding, plus explicit charges
  int64_t peak_bytes = 0;     // largest current_bytes since the last reset_peak
  int64_t allocations = 0;    // blocks handed out so far
};

struct CacheStats {
  int64_t handed_out_bytes = 0;    // all ranks, without explicit charges
  int64_t cached_bytes = 0;        // freed blocks kept for reuse
  int64_t system_allocations = 0;  // blocks taken from the system so far; flat in a steady state
};

// Makes the allocator LibTorch's CPU allocator for the rest of the process; later calls do nothing.
// Call it before the first tensor: blocks of another allocator are not counted.
void install_cpu_allocator();
[[nodiscard]] bool is_cpu_allocator_installed();

inline constexpr int kMaxRanks = 1024;  // ranks above share the last account

[[nodiscard]] MemoryStats stats(int rank);
[[nodiscard]] CacheStats cache_stats();
void reset_peak(int rank);
// Adds bytes that the allocator does not see (mapped staging buffers) to a rank; negative takes
// them off.
void charge(int rank, int64_t bytes);
// Rank of threads without one (OpenMP workers); 0 until set. A process that is one rank sets its
// own.
void set_default_rank(int rank);

// Returns all cached blocks to the system; returns their bytes.
int64_t release_cached();
// Freed blocks above this total go back to the system (default: a quarter of the memory limit).
void set_cache_limit(int64_t bytes);

}  // namespace capstan::device
