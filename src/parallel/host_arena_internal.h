// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Pinned memory in large pieces that are kept, cut into places of any size: what a step takes and
// gives back costs no call of the driver in the next one. Thread-safe.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "capstan/device/accelerator.h"

namespace capstan::parallel {

using at::Tensor;

class HostArena {
 public:
  struct Place {
    size_t slab = 0;
    int64_t begin = 0, bytes = 0;
  };
  explicit HostArena(device::Accelerator& accelerator) : accelerator_(accelerator) {}

  // Throws EnvError where the host has no more pinned memory.
  [[nodiscard]] Place take(int64_t bytes);
  // Copies into and out of the place may still be queued: whoever takes it next is ordered behind.
  void give_back(const Place& place);
  [[nodiscard]] Tensor memory(const Place& place) const;  // uint8, at a multiple of 512 bytes
  [[nodiscard]] int64_t reserved_bytes() const;

 private:
  struct Slab {
    Tensor memory;
    std::map<int64_t, int64_t> free;  // begin -> bytes; no two of them touch
  };
  [[nodiscard]] Tensor new_slab(int64_t bytes) const;
  [[nodiscard]] int64_t reserved() const;

  device::Accelerator& accelerator_;
  mutable std::mutex mutex_;
  std::vector<Slab> slabs_;
};

}  // namespace capstan::parallel
