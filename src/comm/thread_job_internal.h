// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the rank threads of one process share: who waits where, the first failure, and the meetings
// of groups.
#pragma once
#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "capstan/comm/backend.h"
#include "comm/meeting_internal.h"
#include "comm/wait_book_internal.h"
#include "comm/wait_graph_internal.h"

namespace capstan::comm {

class ThreadJob {
 public:
  ThreadJob(int size, double timeout_s);

  [[nodiscard]] const std::shared_ptr<RankState>& rank_state(int rank) const {
    return states_[static_cast<size_t>(rank)];
  }

  // The first reason stays. Wakes every waiting rank. `rank` is the failing one.
  void abort(int rank, const std::string& reason) noexcept;
  [[nodiscard]] bool is_aborted() const { return aborted_.load(std::memory_order_acquire); }
  [[nodiscard]] AbortedError aborted_error(const std::string& where) const;

  // The launcher's book: what ranks threw.
  struct Failure {
    int rank;
    std::string text;
    std::exception_ptr exception;
    bool is_consequence;  // an AbortedError
  };
  void record_failure(Failure failure);
  void record_end(int rank);
  [[nodiscard]] std::optional<Failure> first_failure() const;

  void note_wait(int rank, std::shared_ptr<Meeting> meeting);
  void clear_wait(int rank);
  [[nodiscard]] ErrorText explain(int rank, const WaitNote* failing = nullptr) const;

  // For waits outside of meetings; see WaitBook.
  void count(int rank, const std::string& counter);
  [[nodiscard]] int64_t note_wait(int rank, WaitNote note, std::function<void()> wake);
  void clear_wait(int rank, int64_t id);

 private:
  [[nodiscard]] std::vector<int> missing_of(int rank, const WaitNote& note) const;

  std::vector<std::shared_ptr<RankState>> states_;
  std::atomic<bool> aborted_ = false;
  mutable std::mutex mutex_;
  int abort_rank_ = -1;
  std::string reason_;
  std::vector<std::shared_ptr<Meeting>> waits_;  // by rank
  struct Note {
    WaitNote note;
    std::function<void()> wake;
  };
  std::vector<std::map<int64_t, Note>> notes_;            // by rank
  std::vector<std::map<std::string, int64_t>> counters_;  // by rank
  int64_t next_note_ = 0;
  std::vector<bool> ended_;
  std::vector<Failure> failures_;  // in the order they came
};

// The book of one rank.
class ThreadWaitBook final : public WaitBook {
 public:
  ThreadWaitBook(std::shared_ptr<ThreadJob> job, int rank) : job_(std::move(job)), rank_(rank) {}
  void count(const std::string& counter) override { job_->count(rank_, counter); }
  [[nodiscard]] int64_t note_wait(WaitNote note, std::function<void()> wake) override {
    return job_->note_wait(rank_, std::move(note), std::move(wake));
  }
  void clear_wait(int64_t id) override { job_->clear_wait(rank_, id); }
  [[nodiscard]] std::exception_ptr fail(const WaitFailure& failure, const WaitNote& note) override;
  void abort(const std::string& reason) noexcept override { job_->abort(rank_, reason); }
  [[nodiscard]] bool is_aborted() const override { return job_->is_aborted(); }
  [[nodiscard]] AbortedError aborted_error(const std::string& where) const override {
    return job_->aborted_error(where);
  }

 private:
  std::shared_ptr<ThreadJob> job_;
  int rank_;
};

// The members' meeting place: finds the meeting of an operation by its place in the order.
class ThreadGroup {
 public:
  // (sender, receiver, number) or (-1, -1, number of the collective)
  using Key = std::tuple<int, int, int64_t>;
  [[nodiscard]] std::shared_ptr<Meeting> find_or_open(const Key& key,
                                                      const std::vector<int>& world_ranks);
  void forget(const Key& key);
  // The `index`-th subgroup split from here, of these members; made by whoever comes first.
  [[nodiscard]] std::shared_ptr<ThreadGroup> subgroup(int64_t index,
                                                      const std::vector<int>& members);

 private:
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<Meeting>> meetings_;
  std::map<std::pair<int64_t, int>, std::shared_ptr<ThreadGroup>>
      subgroups_;  // by (split, first member)
};

// The handle of one rank.
class ThreadBackend final : public Backend {
 public:
  ThreadBackend(std::shared_ptr<ThreadJob> job, std::shared_ptr<ThreadGroup> place,
                const Group& group);
  [[nodiscard]] const char* name() const override { return "threads"; }
  [[nodiscard]] std::shared_ptr<WorkState> issue(Request request) override;
  [[nodiscard]] std::shared_ptr<Backend> split(const std::string& axis,
                                               const std::vector<int>& members) override;
  void abort(const std::string& reason) noexcept override {
    job_->abort(group().world_rank(), reason);
  }
  [[nodiscard]] bool is_aborted() const override { return job_->is_aborted(); }
  [[nodiscard]] std::shared_ptr<WaitBook> wait_book() const override {
    return std::make_shared<ThreadWaitBook>(job_, group().world_rank());
  }

 private:
  std::shared_ptr<ThreadJob> job_;
  std::shared_ptr<ThreadGroup> place_;
  int64_t next_collective_ = 0, next_split_ = 0;
  std::map<std::pair<int, int>, int64_t> next_message_;
};

}  // namespace capstan::comm
