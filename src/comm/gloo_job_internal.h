// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the gloo groups of one process share: the store, the first failure of the job, and the
// watcher thread, which learns of failures elsewhere and answers other ranks that ask what this one
// is doing.
#pragma once
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "capstan/comm/backend.h"
#include "comm/gloo_transport_internal.h"
#include "comm/store_internal.h"
#include "comm/wait_book_internal.h"
#include "comm/wait_graph_internal.h"

namespace capstan::comm {

class GlooJob final : public WaitBook {
 public:
  struct Stores {
    std::shared_ptr<KeyStore> main, watcher;  // may be the same object
  };
  GlooJob(Stores stores, NetworkDevice device, std::shared_ptr<RankState> state, int size);
  ~GlooJob() override;
  GlooJob(const GlooJob&) = delete;
  GlooJob& operator=(const GlooJob&) = delete;

  [[nodiscard]] KeyStore& store() { return *stores_.main; }
  [[nodiscard]] const NetworkDevice& device() const { return device_; }
  [[nodiscard]] const std::shared_ptr<RankState>& rank_state() const { return state_; }

  // The first reason over all ranks stays; connections of all groups are closed. Any thread.
  void abort(const std::string& reason) noexcept override;
  [[nodiscard]] bool is_aborted() const override { return aborted_; }
  [[nodiscard]] AbortedError aborted_error(const std::string& where) const override;

  [[nodiscard]] std::exception_ptr fail(const WaitFailure& failure, const WaitNote& note) override;
  void count(const std::string& counter) override;
  [[nodiscard]] int64_t note_wait(WaitNote note, std::function<void()> wake) override;
  void clear_wait(int64_t id) override;

  void add_transport(const std::shared_ptr<GlooTransport>& transport);
  void stop_watching();  // before the orderly end: rank 0 may leave first

 private:
  void watch();
  void answer_questions(int64_t& answered);
  void abort_here(const std::string& reason) noexcept;
  [[nodiscard]] std::string own_status() const;
  [[nodiscard]] std::map<int, RankStatus> ask_all_ranks();
  [[nodiscard]] std::optional<std::string> failure_elsewhere(double patience_s);

  Stores stores_;
  NetworkDevice device_;
  std::shared_ptr<RankState> state_;
  int size_;
  mutable std::mutex mutex_;
  std::condition_variable stop_changed_;
  bool stop_ = false;
  std::atomic<bool> aborted_ = false;
  std::string reason_;  // "rank 2 failed first: ..."
  std::map<std::string, int64_t> counters_;
  struct Wait {
    WaitNote note;
    std::function<void()> wake;
  };
  std::map<int64_t, Wait> waits_;
  int64_t next_wait_ = 0;
  std::vector<std::weak_ptr<GlooTransport>> transports_;
  std::thread watcher_;
};

// The world group of a job.
[[nodiscard]] Communicator make_gloo_world(const std::shared_ptr<GlooJob>& job, int size);

// Rank `rank` of `size` ranks that are threads of this process and share an in-process store: the
// conformance suite runs gloo without processes. Collective over: the ranks.
[[nodiscard]] Communicator join_local_gloo(const std::shared_ptr<KeyStore>& store, int rank,
                                           int size, double timeout_s);

}  // namespace capstan::comm
