// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Copies between pinned host memory and the device beside the stream that computes: a stream for
// each direction. Nothing here makes the host wait unless it says so.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#include "capstan/device/accelerator.h"

namespace capstan::parallel {

using at::Tensor;

class HostArena;

// A place in the work of a stream. Lets go of its event even where others still wait for it.
class StreamMark {
 public:
  explicit StreamMark(device::Accelerator& accelerator)
      : accelerator_(accelerator), event_(accelerator.create_event()) {}
  ~StreamMark();
  StreamMark(const StreamMark&) = delete;
  StreamMark& operator=(const StreamMark&) = delete;

  void set(device::Stream stream) { accelerator_.record(event_, stream); }
  // `stream` goes on behind the place that was set last.
  void hold(device::Stream stream) const { accelerator_.wait(stream, event_); }
  void synchronize() const { accelerator_.synchronize(event_); }  // the host waits

 private:
  device::Accelerator& accelerator_;
  device::Event event_;
};

// Of one rank. Its streams live as long as the process.
class HostLink {
 public:
  explicit HostLink(device::Accelerator& accelerator);
  // The current stream goes on behind all copies: memory of both sides is free for others.
  ~HostLink();
  HostLink(const HostLink&) = delete;
  HostLink& operator=(const HostLink&) = delete;

  // Pinned memory: what all copies of this link share.
  [[nodiscard]] const std::shared_ptr<HostArena>& arena() const { return arena_; }
  // [numel], of the arena, for as long as that lives.
  [[nodiscard]] Tensor pinned(int64_t numel, at::ScalarType dtype) const;

  [[nodiscard]] device::Accelerator& accelerator() const { return accelerator_; }
  [[nodiscard]] device::Stream to_host() const { return to_host_; }
  [[nodiscard]] device::Stream to_device() const { return to_device_; }
  // `later` goes on behind what is queued on `earlier` by now.
  void order(device::Stream earlier, device::Stream later) const;
  // Queues `to` <- `from` on one of the two streams; equal sizes and dtypes, the host's contiguous
  // and pinned. Ordering it is the caller's business, before and behind.
  void copy(const Tensor& from, const Tensor& to, device::Stream stream) const;

 private:
  device::Accelerator& accelerator_;
  std::shared_ptr<HostArena> arena_;
  device::Stream to_host_, to_device_;
};

}  // namespace capstan::parallel
