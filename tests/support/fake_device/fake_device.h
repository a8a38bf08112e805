// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A device "fake:0" for tests without a GPU, on LibTorch's PrivateUse1 key. Ops run at once, on the
// calling thread, with the CPU's kernels; what it takes from a GPU is what host code can get wrong:
//  - memory: the host cannot touch data_ptr() (the process dies); new and freed memory holds NaN
//    bytes; blocks are reused by the stream that allocated them, as by CUDA's caching allocator;
//  - devices: an op on tensors of two devices throws, as on CUDA;
//  - streams: every byte remembers who wrote and read it; an op that is not ordered behind those of
//    other streams by events or host waits throws MissingWait, whatever the timing;
//  - host memory: a non-blocking copy to pinned memory arrives when the host waits for it (NaN
//    until then); changing the pinned source of a copy before it is done throws MissingWait, and
//    so do copies of several streams from and to the same pinned memory without order.
//  - graphs: while one is recorded ops compute as ever, so that their results have shapes, and what
//    they wrote is taken back at the end; a launch runs them again at the same addresses and throws
//    when memory from before the capture was freed since. A host wait during a capture throws.
// A blocking copy, item() and ops such as nonzero wait for the current stream and count as host
// waits; so do non-blocking copies that are none on CUDA (pageable memory, other types, gaps). All
// thread ranks share the device and its default stream. Thread-safe.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "capstan/device/accelerator.h"

namespace capstan::test {

class MissingWait : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Registers everything and installs the accelerator; further calls return the same one.
device::Accelerator& install_fake_device();
[[nodiscard]] c10::Device fake_device();

// Where the bytes of a device pointer live. Not checked for races; freed memory is refused. Writing
// past the end of a tensor's memory this way ends the program when that memory is freed.
[[nodiscard]] void* host_of(const void* device_pointer);
// The same memory as a CPU tensor, which keeps the device tensor alive. Not checked for races.
[[nodiscard]] at::Tensor host_view(const at::Tensor& tensor);
// Checks and remembers an access of the current stream, as an op named `op` (a literal) would: for
// communicators and kernels that work on host_view() themselves.
void note_access(const at::Tensor& tensor, bool is_write, const char* op);
void note_access(const void* device_pointer, size_t bytes, bool is_write, const char* op);

// For kernels that work on host memory themselves: what a graph that is being recorded repeats.
// Does nothing outside of a capture.
void record_for_graph(std::function<void()> op);
[[nodiscard]] int64_t graph_launches();
[[nodiscard]] int64_t graph_launches_of_thread();
// Forward calls of attention with lengths, so far.
[[nodiscard]] int64_t calls_with_lengths();
// Products of groups of rows (_grouped_mm), so far.
[[nodiscard]] int64_t grouped_products();
// Products of as many matrices that add to themselves (baddbmm with a type), so far.
[[nodiscard]] int64_t batched_products();

// How often the host waited for the device: all threads, and this one.
[[nodiscard]] int64_t host_syncs();
[[nodiscard]] int64_t host_syncs_of_thread();
// What the last `count` of them were, for the message of a failed test: "item, aten::nonzero".
[[nodiscard]] std::string last_host_syncs(int64_t count);

// Allocating more than this throws c10::OutOfMemoryError.
void set_fake_memory_bytes(int64_t bytes);

// Backward on the calling thread while it lives. LibTorch has one backward thread per device, so
// thread ranks whose backward waits for each other inside a node need this (it is per thread).
class BackwardOnThisThread {
 public:
  BackwardOnThisThread();
  ~BackwardOnThisThread();
  BackwardOnThisThread(const BackwardOnThisThread&) = delete;
  BackwardOnThisThread& operator=(const BackwardOnThisThread&) = delete;

 private:
  bool previous_;
};

}  // namespace capstan::test
