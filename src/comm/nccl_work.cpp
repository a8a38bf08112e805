// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_work_internal.h"

#include <chrono>
#include <optional>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/env.h"
#include "capstan/base/trace.h"

namespace capstan::comm {
namespace {

constexpr std::chrono::seconds kAbortPatience{10};

}  // namespace

void NcclAborts::begin() {
  std::lock_guard lock(mutex_);
  ++count_;
}

void NcclAborts::end() {
  std::lock_guard lock(mutex_);
  --count_;
  changed_.notify_all();
}

void NcclAborts::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, kAbortPatience, [this] { return count_ == 0; });
}

NcclDevice::NcclDevice(std::shared_ptr<NcclApi> nccl, device::Accelerator& where,
                       std::shared_ptr<WaitBook> waits, std::shared_ptr<RankState> rank_state)
    : api(std::move(nccl)),
      accelerator(where),
      book(std::move(waits)),
      state(std::move(rank_state)) {}

NcclDevice::~NcclDevice() {
  for (const device::Event event : events_) accelerator.destroy(event);
}

device::Event NcclDevice::take_event() {
  {
    std::lock_guard lock(mutex_);
    if (!events_.empty()) {
      const device::Event event = events_.back();
      events_.pop_back();
      return event;
    }
  }
  return accelerator.create_event();
}

void NcclDevice::give_back(device::Event event) {
  std::lock_guard lock(mutex_);
  events_.push_back(event);
}

void NcclDevice::fail(NcclWork& work, const WaitFailure& failure) {
  {
    std::lock_guard lock(mutex_);
    ++explaining_;
  }
  const std::exception_ptr found = book->fail(failure, work.place().note);
  work.fail(found);
  {
    std::lock_guard lock(mutex_);
    --explaining_;
    if (!failure_) failure_ = found;
  }
  explained_.notify_all();
}

bool NcclDevice::is_explaining() const {
  std::lock_guard lock(mutex_);
  return explaining_ > 0;
}

void NcclDevice::rethrow_end(const std::string& where) {
  std::unique_lock lock(mutex_);
  explained_.wait(lock, [this] { return explaining_ == 0; });
  if (failure_) std::rethrow_exception(failure_);
  lock.unlock();
  throw book->aborted_error(where);
}

NcclRecordedWork::NcclRecordedWork(std::shared_ptr<NcclDevice> device, Request request)
    : device_(std::move(device)),
      request_(std::move(request)),
      ready_(device_->take_event()),
      done_(device_->take_event()) {
  device_->accelerator.record(ready_, device_->accelerator.current_stream());
}

NcclRecordedWork::~NcclRecordedWork() {
  device_->give_back(ready_);
  device_->give_back(done_);
}

void NcclRecordedWork::fork(device::Stream stream) { device_->accelerator.wait(stream, ready_); }
void NcclRecordedWork::end(device::Stream stream) { device_->accelerator.record(done_, stream); }

void NcclRecordedWork::wait() {
  device::Accelerator& accelerator = device_->accelerator;
  CAPSTAN_CHECK(accelerator.is_capturing(), "{} on {} is part of a graph and waited for outside",
                describe(request_), request_.axis);
  accelerator.wait(accelerator.current_stream(), done_);
}

NcclWork::NcclWork(std::shared_ptr<NcclDevice> device, Request request, Place place)
    : device_(std::move(device)),
      request_(std::move(request)),
      place_(std::move(place)),
      issued_on_(device_->accelerator.current_stream()),
      ready_(device_->take_event()),
      done_(device_->take_event()) {
  device_->accelerator.record(ready_, issued_on_);
}

NcclWork::~NcclWork() {
  device_->give_back(ready_);
  device_->give_back(done_);
}

void NcclWork::wait() {
  CAPSTAN_CHECK(!device_->accelerator.is_capturing(),
                "{} came before the recording that waits for it", place_.note.title);
  Request released;
  std::unique_lock lock(mutex_);
  if (phase_ == Phase::kQueued && !failure_) {
    std::optional<trace::Span> span;
    if (trace::is_on()) span.emplace("comm", "wait for the start of " + place_.note.title);
    changed_.wait(lock, [this] { return phase_ != Phase::kQueued || failure_; });
  }
  if (failure_) std::rethrow_exception(failure_);
  if (phase_ == Phase::kLaunched && device_->accelerator.is_done(done_)) {
    lock.unlock();
    finish();
    lock.lock();
  }
  if (phase_ == Phase::kDone) return;
  is_waited_for_ = true;
  const device::Stream current = device_->accelerator.current_stream();
  lock.unlock();  // the watcher must see the work, however long the device's queue takes this
  device_->accelerator.wait(current, done_);
  lock.lock();
  // On the stream that issued, whatever reuses the memory now comes after the operation.
  if (current.handle == issued_on_.handle) std::swap(released, request_);
}

bool NcclWork::is_done() const {
  std::lock_guard lock(mutex_);
  if (failure_ || phase_ == Phase::kDone) return true;
  return phase_ == Phase::kLaunched && device_->accelerator.is_done(done_);
}

void NcclWork::set_launched(device::Stream stream) {
  device_->accelerator.record(done_, stream);
  {
    std::lock_guard lock(mutex_);
    phase_ = Phase::kLaunched;
  }
  changed_.notify_all();
}

bool NcclWork::has_ended_on_device() const {
  std::lock_guard lock(mutex_);
  if (phase_ == Phase::kDone) return true;
  return !failure_ && phase_ == Phase::kLaunched && device_->accelerator.is_done(done_);
}

bool NcclWork::is_waited_for() const {
  std::lock_guard lock(mutex_);
  return is_waited_for_;
}

std::exception_ptr NcclWork::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

void NcclWork::synchronize() { device_->accelerator.synchronize(done_); }

void NcclWork::finish() {
  take_turn();
  Request released;
  {
    std::lock_guard lock(mutex_);
    phase_ = Phase::kDone;
    std::swap(released, request_);
  }
  end(true);
}

void NcclWork::fail(std::exception_ptr failure) {
  {
    std::lock_guard lock(mutex_);
    if (failure_) return;
    failure_ = std::move(failure);
  }
  changed_.notify_all();
  end(false);
}

void NcclWork::end(bool ok) {
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(has_ended_, true)) return;
  }
  device_->state->recorder.end(place_.flight, ok);
  clear_wait();
}

void NcclWork::clear_wait() {
  if (const int64_t id = wait_id_.exchange(-1); id >= 0) device_->book->clear_wait(id);
}

bool NcclWork::can_take_turn() const {
  return turn_ns_ == 0 && device_->accelerator.is_done(ready_);
}

void NcclWork::take_turn() {
  int64_t none = 0;
  if (!turn_ns_.compare_exchange_strong(none, monotonic_ns())) return;
  device_->book->count(place_.counter);
  device_->state->recorder.begin(place_.flight);
}

double NcclWork::waited_s() const {
  return turn_ns_ == 0 ? 0 : static_cast<double>(monotonic_ns() - turn_ns_) * 1e-9;
}

void NcclWork::note_wait() {
  if (wait_id_ >= 0) return;
  wait_id_ = device_->book->note_wait(place_.note, [] {});
  {
    std::lock_guard lock(mutex_);
    if (!has_ended_) return;
  }
  clear_wait();  // the end came before there was anything to clear
}

}  // namespace capstan::comm
