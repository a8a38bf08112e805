// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The NCCL groups of one rank and the thread that watches over them.
#pragma once
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "comm/nccl_channel_internal.h"

namespace capstan::comm {

class NcclJob {
 public:
  explicit NcclJob(std::shared_ptr<NcclDevice> device);
  ~NcclJob();
  NcclJob(const NcclJob&) = delete;
  NcclJob& operator=(const NcclJob&) = delete;

  [[nodiscard]] const std::shared_ptr<NcclDevice>& device() const { return device_; }
  [[nodiscard]] std::shared_ptr<NcclChannel> open_channel(NcclChannel::Place place,
                                                          NcclChannel::IdSource id);
  // Graphs under way: a channel without a communicator.
  [[nodiscard]] NcclChannel& launches() { return *launches_; }
  // Ends what runs on the device, in every group; its operations fail with the job's first reason.
  void close_channels() noexcept;

 private:
  void watch();
  void check_channels();
  [[nodiscard]] std::vector<std::shared_ptr<NcclChannel>> channels();

  std::shared_ptr<NcclDevice> device_;
  std::mutex mutex_;
  std::condition_variable stop_changed_;
  bool stop_ = false;
  std::vector<std::weak_ptr<NcclChannel>> channels_;
  std::shared_ptr<NcclChannel> launches_;
  std::thread watcher_;
};

}  // namespace capstan::comm
