// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/plan/host_slabs.h"
#include "parallel/host_arena_internal.h"

namespace capstan::parallel {
HostArena::Place HostArena::take(int64_t bytes) {
  const int64_t needed = std::max(plan::kHostRound, round_up(bytes, plan::kHostRound));
  const std::lock_guard lock(mutex_);
  for (size_t s = 0; s < slabs_.size(); ++s) {
    auto& free = slabs_[s].free;
    const auto found = std::find_if(free.begin(), free.end(),
                                    [&](const auto& hole) { return hole.second >= needed; });
    if (found == free.end()) continue;
    const auto [begin, size] = *found;
    free.erase(found);
    if (size > needed) free.emplace(begin + needed, size - needed);
    return {s, begin, needed};
  }
  const int64_t size = plan::next_host_slab(reserved(), needed);
  slabs_.push_back({new_slab(size), {}});
  if (size > needed) slabs_.back().free.emplace(needed, size - needed);
  return {slabs_.size() - 1, 0, needed};
}

Tensor HostArena::new_slab(int64_t bytes) const {
  try {
    return accelerator_.empty_pinned({bytes}, at::kByte);
  } catch (const c10::Error& error) {
    throw EnvError(ErrorText{
        .module = "parallel",
        .what = "taking pinned host memory for what is offloaded",
        .got = error.what_without_backtrace(),
        .need = fmt::format("{} more beside {}", format_bytes(bytes), format_bytes(reserved())),
        .why = "copies run beside the device only from and to pinned memory",
        .fix = "Start fewer ranks on this host, offload less (parallel.zero.offload, "
               "parallel.offload_activations), or raise the limit of locked memory"});
  }
}

void HostArena::give_back(const Place& place) {
  const std::lock_guard lock(mutex_);
  auto& free = slabs_.at(place.slab).free;
  auto hole = free.emplace(place.begin, place.bytes).first;
  if (hole != free.begin()) {
    const auto before = std::prev(hole);
    if (before->first + before->second == hole->first) {
      before->second += hole->second;
      free.erase(hole);
      hole = before;
    }
  }
  const auto next = std::next(hole);
  if (next == free.end() || hole->first + hole->second != next->first) return;
  hole->second += next->second;
  free.erase(next);
}

Tensor HostArena::memory(const Place& place) const {
  const std::lock_guard lock(mutex_);
  return slabs_.at(place.slab).memory.narrow(0, place.begin, place.bytes);
}

int64_t HostArena::reserved() const {
  int64_t bytes = 0;
  for (const Slab& slab : slabs_) bytes += slab.memory.numel();
  return bytes;
}

int64_t HostArena::reserved_bytes() const {
  const std::lock_guard lock(mutex_);
  return reserved();
}

}  // namespace capstan::parallel
