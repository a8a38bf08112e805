// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Memory of the fake device: addresses nobody may touch, their bytes elsewhere, and for each byte
// the ops that last wrote and read it.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include "capstan/device/accelerator.h"
#include "support/fake_device/timeline.h"

namespace capstan::test::fake {

c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
bool is_device_pointer(const void* pointer);
bool is_pinned(const void* pointer);

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

device::DeviceMemory memory_stats();
void reset_peak();
// All bytes that were ever given out, and the way back to them.
[[nodiscard]] std::vector<char> snapshot();
void restore(const std::vector<char>& bytes);

}  // namespace capstan::test::fake
