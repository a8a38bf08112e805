// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_channel_internal.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "capstan/base/check.h"
#include "capstan/base/log.h"

namespace capstan::comm {
namespace {

constexpr const char* kLookElsewhere =
    "Look for an earlier failure of another rank, then at what NCCL_DEBUG=WARN prints";
constexpr std::chrono::seconds kLaunchPatience{1};

}  // namespace

NcclChannel::NcclChannel(std::shared_ptr<NcclDevice> device, Place place, IdSource id)
    : device_(std::move(device)), place_(std::move(place)), id_(std::move(id)) {}

NcclChannel::~NcclChannel() {
  if (comm_.handle == nullptr) return;
  const NcclResult result = device_->api->comm_destroy(comm_);
  if (result != NcclResult::kSuccess)
    log::warning("comm", "{}", nccl_error_text(*device_->api, {}, "ncclCommDestroy", result));
}

void NcclChannel::submit(const std::shared_ptr<NcclWork>& work) {
  const std::string& title = work->place().note.title;
  switch (enqueue(work)) {
    case Next::kLaunch:
      if (const auto failure = launch(work)) std::rethrow_exception(failure);
      return;
    case Next::kLaunchedLater:
      return;
    case Next::kRefuse:
      work->fail(std::make_exception_ptr(device_->book->aborted_error(title)));
      device_->rethrow_end(title);
  }
}

NcclChannel::Next NcclChannel::enqueue(const std::shared_ptr<NcclWork>& work) {
  std::lock_guard lock(mutex_);
  if (is_closed_) return Next::kRefuse;
  settle_locked();
  outstanding_.push_back(work);
  if (is_ready_) return Next::kLaunch;
  backlog_.push_back(work);
  if (!std::exchange(is_started_, true)) {
    stream_ = device_->accelerator.create_stream(true);
    std::thread([self = shared_from_this()] { self->start(); }).detach();
  }
  return Next::kLaunchedLater;
}

// The thread owns the channel: NCCL cannot be woken while a communicator is made, so nobody joins
// it.
void NcclChannel::start() {
  log::set_thread_rank(device_->state->rank);
  try {
    if (!make_communicator()) return;
  } catch (const std::exception& e) {
    if (const auto work = head()) explain(*work, e.what());
    return;
  }
  launch_backlog();
}

bool NcclChannel::make_communicator() {
  NcclApi& api = *device_->api;
  device_->accelerator.set_device(device_->accelerator.device().index());
  const auto id = id_(is_closed_);
  if (!id) return false;
  NcclComm comm;
  check_nccl(api, {}, "ncclCommInitRankConfig",
             api.comm_init_rank(comm, place_.size, *id, place_.rank, {.name = place_.name}));
  std::lock_guard lock(mutex_);
  if (!is_closed_) {
    comm_ = comm;
    return true;
  }
  if (api.comm_abort(comm) != NcclResult::kSuccess)
    log::debug("comm", "a communicator of {} outlived its end", place_.name);
  return false;
}

void NcclChannel::launch_backlog() {
  for (;;) {
    std::shared_ptr<NcclWork> next;
    {
      std::lock_guard lock(mutex_);
      is_ready_ = backlog_.empty();
      if (is_ready_) became_ready_.notify_all();
      if (is_ready_ || is_closed_) return;
      next = backlog_.front();
      backlog_.pop_front();
    }
    if (launch(next)) return;
  }
}

std::exception_ptr NcclChannel::launch(const std::shared_ptr<NcclWork>& work) {
  const std::string error = call_nccl(*work);
  if (error.empty()) return nullptr;
  explain(*work, error);
  return work->failure();
}

std::string NcclChannel::call_nccl(NcclWork& work) {
  return with_communicator([&](NcclComm comm) {
    device_->accelerator.wait(stream_, work.ready());
    launch_on_nccl({*device_->api, comm, stream_, place_.rank, place_.size}, work.request());
    work.set_launched(stream_);
  });
}

std::string NcclChannel::with_communicator(const std::function<void(NcclComm)>& call) {
  NcclComm comm;
  {
    std::lock_guard lock(mutex_);
    if (is_closed_) return {};  // the operation has failed by now
    is_launching_ = true;
    comm = comm_;
  }
  std::string error;
  try {
    call(comm);
  } catch (const std::exception& e) {
    error = e.what();
  }
  {
    std::lock_guard lock(mutex_);
    is_launching_ = false;
  }
  launched_.notify_all();
  return error;
}

// Made by earlier operations: what a communicator needs at first cannot be part of a graph.
void NcclChannel::wait_until_ready() {
  std::unique_lock lock(mutex_);
  CAPSTAN_CHECK(is_started_, "the first operation of {} is one of a graph", place_.name);
  became_ready_.wait(lock, [this] { return is_ready_ || is_closed_; });
  is_recorded_ = true;
}

std::shared_ptr<WorkState> NcclChannel::record(Request request) {
  wait_until_ready();
  const std::string title = describe(request) + " on " + request.axis;
  if (is_closed_) device_->rethrow_end(title);
  const auto work = std::make_shared<NcclRecordedWork>(device_, std::move(request));
  const std::string error = with_communicator([&](NcclComm comm) {
    work->fork(stream_);
    launch_on_nccl({*device_->api, comm, stream_, place_.rank, place_.size}, work->request());
    work->end(stream_);
  });
  if (error.empty()) return work;
  throw EnvError(ErrorText{.module = "comm",
                           .what = "recording " + title + " as part of a graph",
                           .got = error,
                           .fix = "Look at what NCCL_DEBUG=WARN prints, or set run.graphs: false"});
}

void NcclChannel::watch(const std::shared_ptr<NcclWork>& work) {
  {
    std::lock_guard lock(mutex_);
    settle_locked();
    if (!is_closed_) return outstanding_.push_back(work);
  }
  device_->rethrow_end(work->place().note.title);
}

void NcclChannel::explain(NcclWork& work, const std::string& got) const {
  device_->fail(work, {.title = work.place().note.title, .got = got, .fix = kLookElsewhere});
}

std::shared_ptr<NcclWork> NcclChannel::head() {
  std::lock_guard lock(mutex_);
  return outstanding_.empty() ? nullptr : outstanding_.front();
}

void NcclChannel::settle() {
  std::lock_guard lock(mutex_);
  settle_locked();
}

void NcclChannel::settle_locked() {
  for (; !outstanding_.empty() && outstanding_.front()->has_ended_on_device();
       outstanding_.pop_front())
    outstanding_.front()->finish();
}

std::optional<NcclChannel::Trouble> NcclChannel::check(const std::shared_ptr<NcclWork>& launched) {
  std::lock_guard lock(mutex_);
  settle_locked();
  const std::shared_ptr<NcclWork> work = outstanding_.empty() ? launched : outstanding_.front();
  if (!work) return std::nullopt;
  const std::string& title = work->place().note.title;
  if (const auto error = async_error())
    return Trouble{work, {.title = title, .got = *error, .fix = kLookElsewhere}};
  if (outstanding_.empty()) return std::nullopt;
  if (work->can_take_turn()) work->take_turn();
  if (work->waited_s() == 0) return std::nullopt;
  work->note_wait();
  if (work->waited_s() <= device_->state->timeout_s) return std::nullopt;
  return Trouble{work, {.title = title, .deadline_passed = true}};
}

std::optional<std::string> NcclChannel::async_error() const {
  if (comm_.handle == nullptr) return std::nullopt;
  NcclResult error = NcclResult::kSuccess;
  const NcclResult asked = device_->api->comm_get_async_error(comm_, error);
  if (asked != NcclResult::kSuccess)
    return nccl_error_text(*device_->api, comm_, "ncclCommGetAsyncError", asked);
  if (error == NcclResult::kSuccess || error == NcclResult::kInProgress) return std::nullopt;
  return nccl_error_text(*device_->api, comm_, "an asynchronous NCCL error", error);
}

void NcclChannel::close(const Reason& why) {
  std::deque<std::shared_ptr<NcclWork>> failed;
  NcclComm comm;
  {
    std::lock_guard lock(mutex_);
    is_closed_ = true;
    backlog_.clear();
    failed.swap(outstanding_);
    comm = std::exchange(comm_, NcclComm{});
  }
  for (const auto& work : failed) work->fail(why(*work));
  {
    // A launch lasts microseconds, unless NCCL connects and waits: then only the abort ends it.
    std::unique_lock lock(mutex_);
    launched_.wait_for(lock, kLaunchPatience, [this] { return !is_launching_; });
  }
  became_ready_.notify_all();
  if (comm.handle != nullptr) abort(comm);
}

// NCCL lets go of a communicator when the last graph with its operations is destroyed, which may be
// a matter of the thread that closes; what runs on the device is ended before that.
void NcclChannel::abort(NcclComm comm) {
  const auto call = [api = device_->api, comm] {
    const NcclResult result = api->comm_abort(comm);
    if (result != NcclResult::kSuccess)
      log::warning("comm", "{}", nccl_error_text(*api, {}, "ncclCommAbort", result));
  };
  if (!is_recorded_) return call();
  device_->aborts->begin();
  std::thread([call, aborts = device_->aborts, &accelerator = device_->accelerator] {
    accelerator.set_device(accelerator.device().index());
    call();
    aborts->end();
  }).detach();
}

void NcclChannel::release(bool at_once) {
  std::deque<std::shared_ptr<NcclWork>> left;
  {
    std::lock_guard lock(mutex_);
    settle_locked();
    left = outstanding_;
    at_once |= std::any_of(left.begin(), left.end(),
                           [](const auto& work) { return !work->is_waited_for(); });
  }
  if (!at_once) {
    for (const auto& work : left) work->synchronize();
    return settle();
  }
  if (left.empty()) return;
  close([](const NcclWork& work) {
    return std::make_exception_ptr(
        AbortedError(ErrorText{.module = "comm",
                               .what = "waiting in " + work.place().note.title,
                               .got = "the end of its communicator before its own"}));
  });
}

}  // namespace capstan::comm
