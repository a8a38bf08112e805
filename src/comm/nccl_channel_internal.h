// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One NCCL communicator with its stream. The communicator is made with the first operation, by a
// thread of its own, which then launches what has been issued meanwhile; later operations are
// launched by the thread that issues them.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "comm/nccl_work_internal.h"

namespace capstan::comm {

class NcclChannel : public std::enable_shared_from_this<NcclChannel> {
 public:
  struct Place {
    int rank = 0, size = 1;  // in the communicator
    std::string name;
  };
  // Returns nothing when `stop` became true first. Called by the channel's own thread.
  using IdSource = std::function<std::optional<NcclUniqueId>(const std::atomic<bool>& stop)>;

  NcclChannel(std::shared_ptr<NcclDevice> device, Place place, IdSource id);
  ~NcclChannel();
  NcclChannel(const NcclChannel&) = delete;
  NcclChannel& operator=(const NcclChannel&) = delete;

  // Operations run in the order of these calls. Throws what the launch itself reports.
  void submit(const std::shared_ptr<NcclWork>& work);
  // The operation becomes part of the graph that is being recorded.
  [[nodiscard]] std::shared_ptr<WorkState> record(Request request);
  // Work that is queued elsewhere, in the order of these calls.
  void watch(const std::shared_ptr<NcclWork>& work);
  // Lets go of what is done.
  void settle();
  // The same, starts the clock of what has its turn, and tells what went wrong. `launched`: a graph
  // under way, which may hold operations of this channel; null: none.
  struct Trouble {
    std::shared_ptr<NcclWork> work;
    WaitFailure failure;
  };
  [[nodiscard]] std::optional<Trouble> check(const std::shared_ptr<NcclWork>& launched);
  [[nodiscard]] std::shared_ptr<NcclWork> head();  // the first that is not done
  // Fails all operations with what `why` says, then aborts the communicator.
  using Reason = std::function<std::exception_ptr(const NcclWork& work)>;
  void close(const Reason& why);
  // The group is gone. Waits on the host for operations that streams wait for; closes the channel
  // if there are others or `at_once`.
  void release(bool at_once);
  [[nodiscard]] bool is_closed() const { return is_closed_; }

 private:
  enum class Next { kLaunch, kLaunchedLater, kRefuse };
  [[nodiscard]] Next enqueue(const std::shared_ptr<NcclWork>& work);
  void start();
  [[nodiscard]] bool make_communicator();
  void launch_backlog();
  // Returns the failure of the work, if any.
  [[nodiscard]] std::exception_ptr launch(const std::shared_ptr<NcclWork>& work);
  [[nodiscard]] std::string call_nccl(NcclWork& work);
  // Calls NCCL with the communicator, unless the channel is closed. Returns what went wrong.
  [[nodiscard]] std::string with_communicator(const std::function<void(NcclComm)>& call);
  void wait_until_ready();
  void abort(NcclComm comm);
  void explain(NcclWork& work, const std::string& got) const;
  [[nodiscard]] std::optional<std::string> async_error() const;  // with the mutex held
  void settle_locked();

  const std::shared_ptr<NcclDevice> device_;
  const Place place_;
  const IdSource id_;
  device::Stream stream_;
  mutable std::mutex mutex_;
  std::atomic<bool> is_closed_ = false;
  bool is_started_ = false, is_ready_ = false;
  bool is_launching_ = false;              // NCCL is being called; one thread at a time launches
  std::atomic<bool> is_recorded_ = false;  // a graph holds operations
  std::condition_variable launched_, became_ready_;
  NcclComm comm_;
  std::deque<std::shared_ptr<NcclWork>> backlog_;      // not launched yet
  std::deque<std::shared_ptr<NcclWork>> outstanding_;  // not done yet, with the backlog
};

// Queues the operation of `request` on the channel's stream; `rank` of `size` in the communicator.
// Throws std::runtime_error naming the call that failed and NCCL's reason.
struct NcclTarget {
  NcclApi& api;
  NcclComm comm;
  device::Stream stream;
  int rank, size;
};
void launch_on_nccl(const NcclTarget& target, const Request& request);
// "ncclAllReduce: unhandled system error (last error: ...)"
[[nodiscard]] std::string nccl_error_text(NcclApi& api, NcclComm comm, const char* call,
                                          NcclResult result);
void check_nccl(NcclApi& api, NcclComm comm, const char* call, NcclResult result);

}  // namespace capstan::comm
