// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The fake device seen by a communicator: streams made here run jobs on a thread of their own, the
// device's own streams compute at once on the calling thread, so for them waiting is waiting.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <mutex>

#include "capstan/device/accelerator.h"

namespace capstan::test {

class QueuedStreams final : public device::Accelerator {
 public:
  explicit QueuedStreams(device::Accelerator& device);
  ~QueuedStreams() override;  // ends waits between streams that are still held up

  void run(device::Stream stream, std::function<void()> job);

  [[nodiscard]] const char* name() const override { return device_.name(); }
  [[nodiscard]] c10::DeviceType type() const override { return device_.type(); }
  [[nodiscard]] int device_count() const override { return device_.device_count(); }
  void set_device(int index) override { device_.set_device(index); }
  [[nodiscard]] c10::Device device() const override { return device_.device(); }
  [[nodiscard]] device::Stream current_stream() const override { return device_.current_stream(); }
  void set_current_stream(device::Stream stream) override { device_.set_current_stream(stream); }
  [[nodiscard]] device::Stream create_stream(bool high_priority) override;
  void synchronize(device::Stream stream) override;
  [[nodiscard]] device::Event create_event() override { return device_.create_event(); }
  void destroy(device::Event event) override;
  void record(device::Event event, device::Stream stream) override;
  void wait(device::Stream stream, device::Event event) override;
  [[nodiscard]] bool is_done(device::Event event) const override;
  void synchronize(device::Event event) override;
  [[nodiscard]] bool is_capturing() const override { return device_.is_capturing(); }
  void keep_for(const at::Tensor& tensor, device::Stream stream) override {
    device_.keep_for(tensor, stream);
  }
  [[nodiscard]] at::Tensor empty_pinned(at::IntArrayRef sizes, at::ScalarType dtype) override {
    return device_.empty_pinned(sizes, dtype);
  }
  [[nodiscard]] device::DeviceMemory memory() const override { return device_.memory(); }
  void reset_peak() override { device_.reset_peak(); }

 private:
  class Queue;
  struct Mark {  // a place in a queue
    std::shared_ptr<Queue> queue;
    int64_t jobs = 0;
  };
  [[nodiscard]] std::shared_ptr<Queue> queue_of(device::Stream stream) const;
  [[nodiscard]] Mark mark_of(device::Event event) const;

  device::Accelerator& device_;
  mutable std::mutex mutex_;
  std::map<void*, std::shared_ptr<Queue>> queues_;
  std::map<void*, Mark> marks_;
};

}  // namespace capstan::test
