// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One operation on the device, from issue to its end there.
#pragma once
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "capstan/comm/backend.h"
#include "capstan/comm/nccl_api.h"
#include "comm/wait_book_internal.h"

namespace capstan::comm {

// Communicators of a rank that are aborted by threads of their own. Thread-safe.
class NcclAborts {
 public:
  void begin();
  void end();
  void finish();  // waits for them, as long as they may take

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0;
};

// What the NCCL groups of one rank share. Thread-safe.
class NcclWork;
struct NcclDevice {
  NcclDevice(std::shared_ptr<NcclApi> api, device::Accelerator& accelerator,
             std::shared_ptr<WaitBook> book, std::shared_ptr<RankState> state);
  ~NcclDevice();
  NcclDevice(const NcclDevice&) = delete;
  NcclDevice& operator=(const NcclDevice&) = delete;

  [[nodiscard]] device::Event take_event();
  void give_back(device::Event event);

  // Explains a failure, ends the job and fails the work with what it found, which later calls of
  // this rank throw as well.
  void fail(NcclWork& work, const WaitFailure& failure);
  // Nobody else may end the works meanwhile: they would hide the explanation.
  [[nodiscard]] bool is_explaining() const;
  // Of a job that has ended.
  [[noreturn]] void rethrow_end(const std::string& where);

  const std::shared_ptr<NcclApi> api;
  device::Accelerator& accelerator;
  const std::shared_ptr<WaitBook> book;
  const std::shared_ptr<RankState> state;
  const std::shared_ptr<NcclAborts> aborts = std::make_shared<NcclAborts>();

 private:
  mutable std::mutex mutex_;
  std::vector<device::Event> events_;  // free ones
  std::condition_variable explained_;
  int explaining_ = 0;
  std::exception_ptr failure_;
};

// An operation that is part of a graph: it exists while that is recorded.
class NcclRecordedWork final : public WorkState {
 public:
  NcclRecordedWork(std::shared_ptr<NcclDevice> device, Request request);
  ~NcclRecordedWork() override;
  [[nodiscard]] const Request& request() const { return request_; }
  void fork(device::Stream stream);  // which comes behind what has been recorded so far
  void end(device::Stream stream);   // behind the operation
  void wait() override;
  [[nodiscard]] bool is_done() const override { return false; }  // nobody may ask the device

 private:
  std::shared_ptr<NcclDevice> device_;
  Request request_;
  const device::Event ready_, done_;
};

class NcclWork final : public WorkState {
 public:
  struct Place {
    WaitNote note;
    std::string counter;  // of this rank
    int64_t flight = -1;
  };
  // Records on the current stream what the operation has to wait for.
  NcclWork(std::shared_ptr<NcclDevice> device, Request request, Place place);
  ~NcclWork() override;

  void wait() override;
  [[nodiscard]] bool is_done() const override;

  // By the channel that runs it.
  [[nodiscard]] const Request& request() const { return request_; }
  [[nodiscard]] const Place& place() const { return place_; }
  [[nodiscard]] device::Event ready() const { return ready_; }
  void set_launched(device::Stream stream);  // records the end on `stream`
  void finish();                             // it is done on the device
  void fail(std::exception_ptr failure);     // the first failure stays
  [[nodiscard]] bool has_ended_on_device() const;
  // Somebody relies on its end: a stream waits for it.
  [[nodiscard]] bool is_waited_for() const;
  [[nodiscard]] std::exception_ptr failure() const;
  void synchronize();  // the host waits for its end on the device

  // By the channel: the operation heads its stream and the device has reached it.
  [[nodiscard]] bool can_take_turn() const;
  void take_turn();
  [[nodiscard]] double waited_s() const;  // since then
  void note_wait();                       // other ranks shall see that this one waits
 private:
  enum class Phase { kQueued, kLaunched, kDone };
  void end(bool ok);
  void clear_wait();

  std::shared_ptr<NcclDevice> device_;
  Request request_;
  const Place place_;
  const device::Stream issued_on_;
  const device::Event ready_, done_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Phase phase_ = Phase::kQueued;
  std::exception_ptr failure_;
  bool has_ended_ = false, is_waited_for_ = false;
  std::atomic<int64_t> turn_ns_ = 0, wait_id_ = -1;
};

}  // namespace capstan::comm
