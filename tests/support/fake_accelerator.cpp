// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_accelerator.h"

#include <ATen/ATen.h>

#include <condition_variable>
#include <cstring>
#include <deque>

#include "capstan/base/check.h"

namespace capstan::test {

// Records are numbered; the event is done when the last one was reached.
struct FakeAccelerator::EventState {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t recorded = 0, reached = 0;
  bool is_over = false;  // the accelerator goes away

  int64_t next_record() {
    std::lock_guard lock(mutex);
    return ++recorded;
  }
  int64_t last_record() {
    std::lock_guard lock(mutex);
    return recorded;
  }
  void reach(int64_t record) {
    std::lock_guard lock(mutex);
    reached = std::max(reached, record);
    changed.notify_all();
  }
  void block(int64_t record) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return is_over || reached >= record; });
  }
  void end() {
    std::lock_guard lock(mutex);
    is_over = true;
    changed.notify_all();
  }
};

class FakeAccelerator::Queue {
 public:
  Queue() : thread_([this] { work(); }) {}
  ~Queue() {
    push(nullptr);
    thread_.join();
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  void push(std::function<void()> job) {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    changed_.notify_all();
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return !jobs_.empty(); });
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      if (!job) return;
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  std::thread thread_;
};

FakeAccelerator::FakeAccelerator() { default_ = create_stream(false); }

FakeAccelerator::~FakeAccelerator() {
  for (const auto& [handle, state] : events_) state->end();
  queues_.clear();
}

void FakeAccelerator::run(device::Stream stream, std::function<void()> job) {
  static_cast<Queue*>(stream.handle)->push(std::move(job));
}

at::Tensor FakeAccelerator::on_device(const at::Tensor& cpu) {
  struct Block {
    std::shared_ptr<FakeAccelerator> owner;
    at::Tensor memory;
    device::Stream stream;
  };
  CAPSTAN_CHECK(cpu.is_cpu() && cpu.is_contiguous(), "the fake device takes plain CPU tensors");
  auto* block = new Block{shared_from_this(), cpu, current_stream()};
  const auto free = [](void* context) {
    const std::unique_ptr<Block> freed(static_cast<Block*>(context));
    freed->owner->run(freed->stream, [memory = std::move(freed->memory)] {
      const bool is_last = memory.use_count() == 1 && memory.storage().use_count() == 1;
      if (is_last && memory.nbytes() > 0) std::memset(memory.data_ptr(), 0xA5, memory.nbytes());
    });
  };
  c10::Storage storage(c10::Storage::use_byte_size_t(), static_cast<int64_t>(cpu.nbytes()),
                       c10::DataPtr(cpu.data_ptr(), block, free, device()), nullptr, false);
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), cpu.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(cpu.sizes());
  return tensor;
}

void FakeAccelerator::set_device(int index) { CAPSTAN_CHECK(index == 0, "device {}", index); }

device::Stream FakeAccelerator::current_stream() const {
  std::lock_guard lock(mutex_);
  const auto found = current_.find(std::this_thread::get_id());
  return found == current_.end() ? default_ : found->second;
}

void FakeAccelerator::set_current_stream(device::Stream stream) {
  std::lock_guard lock(mutex_);
  current_[std::this_thread::get_id()] = stream;
}

device::Stream FakeAccelerator::create_stream(bool /*high_priority*/) {
  std::lock_guard lock(mutex_);
  queues_.push_back(std::make_unique<Queue>());
  return {queues_.back().get()};
}

void FakeAccelerator::synchronize(device::Stream stream) {
  const device::Event event = create_event();
  record(event, stream);
  synchronize(event);
  destroy(event);
}

device::Event FakeAccelerator::create_event() {
  auto state = std::make_shared<EventState>();
  std::lock_guard lock(mutex_);
  void* const handle = state.get();
  events_.emplace(handle, std::move(state));
  return {handle};
}

void FakeAccelerator::destroy(device::Event event) {
  std::lock_guard lock(mutex_);
  CAPSTAN_CHECK(events_.erase(event.handle) == 1, "an event that does not exist");
}

std::shared_ptr<FakeAccelerator::EventState> FakeAccelerator::state_of(device::Event event) const {
  std::lock_guard lock(mutex_);
  return events_.at(event.handle);
}

void FakeAccelerator::record(device::Event event, device::Stream stream) {
  auto state = state_of(event);
  const int64_t record = state->next_record();
  run(stream, [state = std::move(state), record] { state->reach(record); });
}

void FakeAccelerator::wait(device::Stream stream, device::Event event) {
  auto state = state_of(event);
  const int64_t record = state->last_record();
  run(stream, [state = std::move(state), record] { state->block(record); });
}

bool FakeAccelerator::is_done(device::Event event) const {
  const auto state = state_of(event);
  std::lock_guard lock(state->mutex);
  return state->reached == state->recorded;
}

void FakeAccelerator::synchronize(device::Event event) {
  const auto state = state_of(event);
  state->block(state->last_record());
}

void FakeAccelerator::keep_for(const at::Tensor& tensor, device::Stream stream) {
  run(stream, [tensor] {});
}

at::Tensor FakeAccelerator::empty_pinned(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, dtype);
}

int FakeAccelerator::live_events() const {
  std::lock_guard lock(mutex_);
  return static_cast<int>(events_.size());
}

}  // namespace capstan::test
