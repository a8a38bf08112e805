// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/queued_streams.h"

#include <ATen/ATen.h>

#include <condition_variable>
#include <deque>
#include <thread>

#include "support/fake_device/capture.h"

namespace capstan::test {

class QueuedStreams::Queue {
 public:
  Queue() : thread_([this] { work(); }) {}
  ~Queue() { stop(); }

  void push(std::function<void()> job) {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    ++pushed_;
    changed_.notify_all();
  }
  [[nodiscard]] int64_t pushed() const {
    const std::lock_guard lock(mutex_);
    return pushed_;
  }
  [[nodiscard]] bool has_done(int64_t jobs) const {
    const std::lock_guard lock(mutex_);
    return done_ >= jobs;
  }
  void wait_for(int64_t jobs) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= jobs || stops_; });
  }
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stops_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stops_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      const auto job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      lock.lock();
      ++done_;
      changed_.notify_all();
    }
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  int64_t pushed_ = 0, done_ = 0;
  bool stops_ = false;
  std::thread thread_;
};

QueuedStreams::QueuedStreams(device::Accelerator& device) : device_(device) {}

QueuedStreams::~QueuedStreams() {
  for (const auto& [handle, queue] : queues_) queue->stop();
}

std::shared_ptr<QueuedStreams::Queue> QueuedStreams::queue_of(device::Stream stream) const {
  const std::lock_guard lock(mutex_);
  const auto found = queues_.find(stream.handle);
  return found == queues_.end() ? nullptr : found->second;
}

QueuedStreams::Mark QueuedStreams::mark_of(device::Event event) const {
  const std::lock_guard lock(mutex_);
  const auto found = marks_.find(event.handle);
  return found == marks_.end() ? Mark{} : found->second;
}

void QueuedStreams::run(device::Stream stream, std::function<void()> job) {
  if (const auto queue = queue_of(stream)) return queue->push(std::move(job));
  job();
}

device::Stream QueuedStreams::create_stream(bool high_priority) {
  const device::Stream made = device_.create_stream(high_priority);
  const std::lock_guard lock(mutex_);
  queues_[made.handle] = std::make_shared<Queue>();
  return made;
}

void QueuedStreams::synchronize(device::Stream stream) {
  if (const auto queue = queue_of(stream)) queue->wait_for(queue->pushed());
  device_.synchronize(stream);
}

void QueuedStreams::destroy(device::Event event) {
  {
    const std::lock_guard lock(mutex_);
    marks_.erase(event.handle);
  }
  device_.destroy(event);
}

void QueuedStreams::record(device::Event event, device::Stream stream) {
  if (fake::record_in_capture(*this, event, stream)) return;
  device_.record(event, stream);
  const auto queue = queue_of(stream);
  const Mark mark{queue, queue ? queue->pushed() : 0};
  const std::lock_guard lock(mutex_);
  marks_[event.handle] = mark;
}

void QueuedStreams::wait(device::Stream stream, device::Event event) {
  if (fake::wait_in_capture(*this, stream, event)) return;
  device_.wait(stream, event);
  const Mark mark = mark_of(event);
  if (mark.queue) run(stream, [mark] { mark.queue->wait_for(mark.jobs); });
}

bool QueuedStreams::is_done(device::Event event) const {
  const Mark mark = mark_of(event);
  return (!mark.queue || mark.queue->has_done(mark.jobs)) && device_.is_done(event);
}

void QueuedStreams::synchronize(device::Event event) {
  const Mark mark = mark_of(event);
  if (mark.queue) mark.queue->wait_for(mark.jobs);
  device_.synchronize(event);
}

}  // namespace capstan::test
