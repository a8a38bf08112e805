// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Collectives of one group over gloo's transport. A thread per group issues the collectives in
// their order, so the rank goes on computing; messages between two ranks are issued at once and
// awaited by two more threads, which start with the first message.
#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "capstan/comm/backend.h"
#include "comm/gloo_job_internal.h"
#include "comm/gloo_transport_internal.h"

namespace capstan::comm {

class GlooWork;

// Runs jobs one after the other on a thread of its own, which starts with the first one.
class Sequence {
 public:
  explicit Sequence(int rank);
  ~Sequence();  // runs what is left
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  void push(std::function<void()> job);
  [[nodiscard]] bool is_idle() const;
  // Forgets the jobs that have not begun and lets the thread end by itself: gloo cannot be woken
  // from every wait. The running job must own all it uses.
  void abandon();

 private:
  struct State;
  static void run(const std::shared_ptr<State>& state);
  std::shared_ptr<State> state_;
  std::thread thread_;
};

class GlooBackend final : public Backend {
 public:
  GlooBackend(std::shared_ptr<GlooJob> job, Group group, std::string id);
  ~GlooBackend() override;

  [[nodiscard]] const char* name() const override { return "gloo"; }
  [[nodiscard]] std::shared_ptr<WorkState> issue(Request request) override;
  [[nodiscard]] std::shared_ptr<Backend> split(const std::string& axis,
                                               const std::vector<int>& members) override;
  void abort(const std::string& reason) noexcept override { core_->job->abort(reason); }
  [[nodiscard]] bool is_aborted() const override { return core_->job->is_aborted(); }
  [[nodiscard]] std::shared_ptr<WaitBook> wait_book() const override { return core_->job; }

 private:
  void issue_message(const std::shared_ptr<GlooWork>& work);
  [[nodiscard]] std::shared_ptr<GlooWork> make_work(Request request);
  void note_collective(GlooWork& work);
  void note_message(GlooWork& work);

  // What running operations need; they may outlive the backend after a failure.
  struct Core {
    std::shared_ptr<GlooJob> job;
    std::shared_ptr<GlooTransport> transport;
    Group group;
    std::atomic<bool> is_closing = false;
  };
  std::shared_ptr<Core> core_;
  std::string id_;  // unique in the job, equal on all members
  int64_t next_collective_ = 0, next_split_ = 0;
  std::map<std::pair<int, int>, int64_t> next_message_;
  Sequence collectives_, sends_, receives_;
};

// The collectives themselves: bytes by the transport, sums by reduce_in_rank_order. `deadline` is
// absolute.
void run_on_transport(GlooTransport& transport, const Request& request, const Group& group,
                      std::chrono::steady_clock::time_point deadline);

}  // namespace capstan::comm
