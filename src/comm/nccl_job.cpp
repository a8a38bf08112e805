// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl_job_internal.h"

#include <chrono>

#include "capstan/base/log.h"

namespace capstan::comm {
namespace {

constexpr std::chrono::milliseconds kPeriod{20};

}  // namespace

NcclJob::NcclJob(std::shared_ptr<NcclDevice> device) : device_(std::move(device)) {
  launches_ = open_channel({.name = "graphs"}, {});  // the first: its works fail before any end
  watcher_ = std::thread([this] { watch(); });
}

NcclJob::~NcclJob() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  stop_changed_.notify_all();
  watcher_.join();
  device_->aborts->finish();
}

std::shared_ptr<NcclChannel> NcclJob::open_channel(NcclChannel::Place place,
                                                   NcclChannel::IdSource id) {
  auto channel = std::make_shared<NcclChannel>(device_, std::move(place), std::move(id));
  std::lock_guard lock(mutex_);
  std::erase_if(channels_, [](const auto& weak) { return weak.expired(); });
  channels_.push_back(channel);
  return channel;
}

std::vector<std::shared_ptr<NcclChannel>> NcclJob::channels() {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<NcclChannel>> open;
  for (const auto& weak : channels_)
    if (auto channel = weak.lock(); channel && !channel->is_closed())
      open.push_back(std::move(channel));
  return open;
}

void NcclJob::close_channels() noexcept {
  try {
    for (const auto& channel : channels())
      channel->close([this](const NcclWork& work) {
        return std::make_exception_ptr(device_->book->aborted_error(work.place().note.title));
      });
  } catch (const std::exception& e) {
    log::error("comm", "aborting NCCL's communicators: {}", e.what());
  }
}

void NcclJob::watch() {
  log::set_thread_rank(device_->state->rank);
  std::unique_lock lock(mutex_);
  while (!stop_changed_.wait_for(lock, kPeriod, [this] { return stop_; })) {
    lock.unlock();
    try {
      check_channels();
    } catch (const std::exception& e) {  // the device itself is broken
      device_->book->abort(e.what());
      close_channels();
    }
    lock.lock();
  }
}

void NcclJob::check_channels() {
  device_->accelerator.set_device(device_->accelerator.device().index());
  for (const auto& channel : channels()) {
    if (device_->book->is_aborted()) break;
    const auto trouble = channel->check(launches_->head());
    if (!trouble) continue;
    device_->fail(*trouble->work, trouble->failure);
  }
  if (device_->book->is_aborted() && !device_->is_explaining()) close_channels();
}

}  // namespace capstan::comm
