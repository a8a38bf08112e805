// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a rank on a GPU takes of the memory of its host.
#include <algorithm>
#include <bit>
#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/plan/host_slabs.h"
#include "capstan/plan/optimizer_states.h"
#include "plan/memory_internal.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

constexpr int64_t kSmallestSlab = kMiB, kLargestSlab = kGiB;

// What zero.offload keeps of a buffer, in the order in which parallel::FlatStore asks for it.
struct OnHost {
  std::vector<int64_t> pinned;  // bytes of each tensor
  int64_t moments = 0;          // not pinned
};

void add_buffer(OnHost& there, const Plan& plan, const FlatBuffer& buffer) {
  const PrecisionPlan& precision = plan.precision;
  const int64_t shard = buffer.shard_numel();
  const auto pin = [&](DType dtype) {
    there.pinned.push_back(saturating_multiply(shard, static_cast<int64_t>(size_of(dtype))));
  };
  const bool all = plan.resolved.parallel.zero.offload == "all";
  if (all) pin(value_dtype(precision, buffer));
  pin(precision.master);
  if (!all && stages_values(plan, buffer)) pin(value_dtype(precision, buffer));
  if (!buffer.trainable) return;
  pin(precision.gradients);
  for (const StateSpec& state :
       optimizer_states(plan.resolved.optimizer, precision.master, buffer.update))
    there.moments += stored_bytes(shard / state.block, state.dtype);
}

OnHost kept_there(const Plan& plan, const RankLayout& layout) {
  OnHost there;
  if (plan.resolved.run.device != "cuda" || plan.resolved.parallel.zero.offload == "none")
    return there;
  for (const FlatBuffer& buffer : layout.buffers) add_buffer(there, plan, buffer);
  return there;
}

// Tensors of as many layers as make up `bytes` at the fullest moment of a step.
void add_activations(OnHost& there, const Plan& plan, int64_t bytes) {
  using Part = ActivationTerm::Part;
  const Part kept =
      plan.resolved.parallel.recompute.mode == "block" ? Part::kBlockInput : Part::kLayer;
  std::vector<int64_t> layer;
  int64_t sum = 0;
  for (const ActivationTerm& term : activation_bytes_of(plan).terms)
    if (term.part == kept && term.bytes > 0) layer.push_back(term.bytes), sum += term.bytes;
  if (sum == 0) return;
  for (int64_t taken = 0; taken < bytes; taken += sum)
    there.pinned.insert(there.pinned.end(), layer.begin(), layer.end());
}

}  // namespace

int64_t next_host_slab(int64_t reserved, int64_t needed) {
  const int64_t wanted = std::max(needed, std::clamp(reserved, kSmallestSlab, kLargestSlab));
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(wanted)));
}

int64_t host_slab_bytes(std::span<const int64_t> requests) {
  std::vector<int64_t> room;  // left in each slab
  int64_t reserved = 0;
  for (const int64_t bytes : requests) {
    if (bytes >= kSaturated || reserved >= kSaturated) return kSaturated;
    const int64_t needed = std::max(kHostRound, round_up(bytes, kHostRound));
    auto slab = std::find_if(room.begin(), room.end(), [&](int64_t r) { return r >= needed; });
    if (slab == room.end()) {
      const int64_t size = next_host_slab(reserved, needed);
      reserved += size;
      slab = room.insert(room.end(), size);
    }
    *slab -= needed;
  }
  return reserved;
}

int64_t host_bytes(const Plan& plan, const RankLayout& layout) {
  const OnHost there = kept_there(plan, layout);
  int64_t bytes = there.moments;
  for (const int64_t tensor : there.pinned) bytes += allocation_bytes(tensor);
  return bytes;
}

int64_t host_taken_bytes(const Plan& plan, const RankLayout& layout, const MemoryReport& report,
                         int64_t activations) {
  if (plan.resolved.run.device != "cuda") return 0;
  OnHost there = kept_there(plan, layout);
  add_activations(there, plan, activations);
  return host_slab_bytes(there.pinned) + there.moments + report.checkpoint_snapshot;
}

}  // namespace capstan::plan
