// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// An accelerator of one rank without a device: each stream is a thread that runs its jobs in order,
// so work that does not wait for the event it needs is seen to run too early. Its tensors lie on
// CPU memory; nothing computes on them but jobs given to run().
#pragma once
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "capstan/device/accelerator.h"

namespace capstan::test {

class FakeAccelerator final : public device::Accelerator,
                              public std::enable_shared_from_this<FakeAccelerator> {
 public:
  FakeAccelerator();
  ~FakeAccelerator() override;  // ends waits of streams that are still held up

  void run(device::Stream stream, std::function<void()> job);
  // A tensor of this device on the memory of `cpu`. Its memory is free when the stream that was
  // current at the call has come that far; it is then filled with garbage if nobody else holds it.
  [[nodiscard]] at::Tensor on_device(const at::Tensor& cpu);

  [[nodiscard]] const char* name() const override { return "fake"; }
  [[nodiscard]] c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  [[nodiscard]] int device_count() const override { return 1; }
  void set_device(int index) override;
  [[nodiscard]] c10::Device device() const override { return {type(), 0}; }
  [[nodiscard]] device::Stream current_stream() const override;
  void set_current_stream(device::Stream stream) override;
  [[nodiscard]] device::Stream create_stream(bool high_priority) override;
  void synchronize(device::Stream stream) override;
  [[nodiscard]] device::Event create_event() override;
  void destroy(device::Event event) override;
  void record(device::Event event, device::Stream stream) override;
  void wait(device::Stream stream, device::Event event) override;
  [[nodiscard]] bool is_done(device::Event event) const override;
  void synchronize(device::Event event) override;
  void keep_for(const at::Tensor& tensor, device::Stream stream) override;
  [[nodiscard]] at::Tensor empty_pinned(at::IntArrayRef sizes, at::ScalarType dtype) override;
  [[nodiscard]] device::DeviceMemory memory() const override { return {}; }
  void reset_peak() override {}

  [[nodiscard]] int live_events() const;

 private:
  class Queue;
  struct EventState;
  [[nodiscard]] std::shared_ptr<EventState> state_of(device::Event event) const;

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Queue>> queues_;
  std::map<void*, std::shared_ptr<EventState>> events_;
  std::map<std::thread::id, device::Stream> current_;
  device::Stream default_;
};

}  // namespace capstan::test
