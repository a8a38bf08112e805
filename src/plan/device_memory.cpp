// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a rank takes of its GPU beside tensors. From sources and manuals, not measured by us.
#include "capstan/base/bytes.h"
#include "plan/memory_internal.h"

namespace capstan::plan {
namespace {

// Assumed: driver state and the loaded kernels of LibTorch, cuBLAS and cuDNN; 0.45 to 0.6 GiB are
// reported of recent cards.
constexpr int64_t kContext = 512 * kMiB;

// LibTorch's workspace of a cuBLAS handle on compute capability 9.0 (32 MiB), as large as
// CUBLAS_WORKSPACE_CONFIG :4096:8 of deterministic runs; older cards take 8.1 MiB. Forward and
// backward are different threads, each with a handle; recorded steps run on a stream apart.
constexpr int64_t kCublas = 32 * kMiB, kThreads = 2;

// What an algorithm of cuBLASLt may ask for (ops/gemm_internal.h): one product at a time, from
// LibTorch's allocator.
constexpr int64_t kCublasLt = 32 * kMiB;

// A connection of NCCL has a buffer for each of its protocols (LL, LL128, Simple at NCCL_BUFFSIZE).
// Assumed: 16 channels of one connection each for every communicator.
constexpr int64_t kConnection = 512 * kKiB + 4800 * kKiB + 4 * kMiB, kChannels = 16;

// Of groups, as the mesh makes them, and one of two ranks for each direction of messages: to and
// from a stage before and behind, and around the ring of a context axis.
int64_t communicators(const Plan& plan, int rank) {
  const Grid& grid = plan.grid;
  const Grid::Sizes& sizes = grid.sizes();
  if (grid.size() == 1) return 0;
  int64_t count = 1 + static_cast<int64_t>(distinct_groups(grid).size());
  const int pp = grid.coord(rank).pp;
  const bool wraps = plan.resolved.parallel.pipeline.chunks > 1 && sizes.pp > 2;
  if (sizes.pp > 1) {
    if (pp > 0 || wraps) count += 2;
    if (pp + 1 < sizes.pp || wraps) count += 2;
  }
  if (sizes.cp > 1 && plan.resolved.parallel.context.method == "ring") count += 2;
  return count;
}

}  // namespace

int64_t device_bytes(const Plan& plan, const MemoryReport& tensors) {
  if (plan.resolved.run.device != "cuda") return 0;
  const bool graphs = plan.resolved.run.graphs;
  const int64_t workspaces =
      kCublas * kThreads + (plan.resolved.run.gemm == "libtorch" ? 0 : kCublasLt);
  int64_t bytes = kContext + workspaces * (graphs ? 2 : 1);
  bytes += communicators(plan, tensors.rank) * kChannels * kConnection;
  // Recorded steps keep their memory, so an evaluation takes other.
  if (graphs) bytes += tensors.workspace;
  return bytes;
}

}  // namespace capstan::plan
