// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Graphs of the fake device: the ops of a capture as functions that run them again. Of the calling
// thread: others are not recorded. Other streams are part of a capture from their first wait for an
// event that was recorded in it; at its end the first stream must be behind all they were given.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "capstan/device/accelerator.h"
#include "support/fake_device/memory.h"

namespace capstan::test::fake {

using Progress = std::map<void*, int64_t>;  // by stream: how many of its jobs

struct Recording {
  struct Mark {
    std::shared_ptr<device::Event> event;  // that launches record
    Progress behind;
  };
  device::Stream origin;
  int pool = 0;
  std::vector<std::function<void()>> ops;
  Snapshot memory;                    // before the capture
  std::map<void*, Progress> streams;  // of the capture
  std::map<void*, Mark> marks;        // by the event that was recorded
};

[[nodiscard]] bool is_capturing();
void begin_capture(device::Stream origin, int pool);
[[nodiscard]] Recording* end_capture();  // the caller's; throws for streams that were not joined
void launch(const Recording& recording);
void destroy(Recording* recording);

// What these make of a capture: true, and `accelerator` does it at each launch. Else false. They
// throw for a stream that is not part of the capture, and for a wait across its bounds.
[[nodiscard]] bool record_in_capture(device::Accelerator& accelerator, device::Event event,
                                     device::Stream stream);
[[nodiscard]] bool wait_in_capture(device::Accelerator& accelerator, device::Stream stream,
                                   device::Event event);
[[nodiscard]] bool run_in_capture(device::Stream stream, std::function<void()> start);
// Throws for an event that was last recorded in a capture: its end is nobody's to see.
void check_not_captured(device::Event event);
void forget(device::Event event);

// The same place in memory, without keeping it alive; CPU tensors as they are.
[[nodiscard]] at::Tensor unowned(const at::Tensor& tensor);
[[nodiscard]] at::IValue unowned(const at::IValue& value);
// Bytes of tensors that lie elsewhere than those of the recorded result.
void copy_result(const at::IValue& made, const at::IValue& recorded);

}  // namespace capstan::test::fake
