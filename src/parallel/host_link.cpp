// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/host_link.h"

#include <ATen/core/grad_mode.h>

#include <exception>

#include "parallel/host_arena_internal.h"

namespace capstan::parallel {

StreamMark::~StreamMark() {
  try {
    accelerator_.destroy(event_);
  } catch (const std::exception&) {  // the device has failed before, which is being reported
  }
}

HostLink::HostLink(device::Accelerator& accelerator)
    : accelerator_(accelerator),
      arena_(std::make_shared<HostArena>(accelerator)),
      to_host_(accelerator.create_stream(false)),
      to_device_(accelerator.create_stream(false)) {}

HostLink::~HostLink() {
  try {
    const device::Stream here = accelerator_.current_stream();
    order(to_host_, here);
    order(to_device_, here);
  } catch (const std::exception&) {  // the device has failed before, which is being reported
  }
}

Tensor HostLink::pinned(int64_t numel, at::ScalarType dtype) const {
  const auto bytes = numel * static_cast<int64_t>(c10::elementSize(dtype));
  return arena_->memory(arena_->take(bytes)).narrow(0, 0, bytes).view(dtype);
}

void HostLink::order(device::Stream earlier, device::Stream later) const {
  StreamMark mark(accelerator_);
  mark.set(earlier);
  mark.hold(later);
}

void HostLink::copy(const Tensor& from, const Tensor& to, device::Stream stream) const {
  const at::NoGradGuard no_grad;
  const device::StreamGuard there(accelerator_, stream);
  to.copy_(from, /*non_blocking=*/true);
}

}  // namespace capstan::parallel
