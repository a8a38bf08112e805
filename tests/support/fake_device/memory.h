// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Memory of the fake device: addresses nobody may touch, their bytes elsewhere, and for each byte
// the ops that last wrote and read it.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <map>
#include <vector>

#include "capstan/device/accelerator.h"
#include "support/fake_device/timeline.h"

namespace capstan::test::fake {

c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
// What the library allocates while an op runs, its results included, which follow the op here.
void hold_at_once(const std::vector<int64_t>& bytes);
bool is_device_pointer(const void* pointer);
bool is_pinned(const void* pointer);
// Of pinned memory in pieces of `smallest` bytes or more, now.
int64_t pinned_bytes(int64_t smallest);

struct Use {
  at::Tensor tensor;
  bool is_write;
};
// Throws MissingWait when `now` is not ordered behind the other streams' ops on these bytes; else
// remembers it as their last read or write.
void note(const std::vector<Use>& uses, const Access& now);
void note(const void* pointer, size_t bytes, bool is_write, const Access& now);
// The block is not given out again before what is queued on `stream` when it is freed is done.
void keep_for(const void* pointer, int stream);

// What ops need that a launch runs again; their results lie elsewhere. No device would reserve it.
inline constexpr int kScratch = -1;
// Memory that this thread allocates on `stream` is the pool's from here on; 0: nobody's again. What
// is allocated in a capture stays for its graph until all graphs of the pool are gone, whoever has
// freed it and taken it again meanwhile.
void allocate_from(int pool, int stream);
void add_graph(int pool);
void remove_graph(int pool);
[[nodiscard]] bool has_graphs(int pool);

device::DeviceMemory memory_stats();
void reset_peak();
// The memory that this thread allocated, and the way back to it: what was allocated since becomes
// NaN.
struct Saved {
  int64_t allocation = 0;  // which one of all
  std::vector<char> bytes;
};
using Snapshot = std::map<size_t, Saved>;  // by the block's place
[[nodiscard]] Snapshot snapshot();
void restore(const Snapshot& blocks);

}  // namespace capstan::test::fake
