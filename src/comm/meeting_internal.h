// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// One operation of ranks that are threads. Each rank arrives with its tensors; nothing is copied
// before all are there. Then the work, cut into pieces of about a quarter megabyte, is done by the
// last rank that came and by all that wait. An operation is done when the last piece is: from then
// on its tensors belong to the ranks again.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "capstan/comm/backend.h"

namespace capstan::comm {

class Meeting {
 public:
  explicit Meeting(std::vector<int> world_ranks);

  struct Arrival {
    bool is_last = false;
    std::string mismatch;  // not empty: this call does not fit the ones before it
  };
  // `title` names the operation in reports; the first one stays.
  [[nodiscard]] Arrival arrive(int member, Request request, const std::string& title);
  void help();  // does pieces of the work until none is left; call without holding the mutex
  [[nodiscard]] bool is_done() const { return done_.load(std::memory_order_acquire); }
  [[nodiscard]] bool is_ready() const { return ready_.load(std::memory_order_acquire); }
  [[nodiscard]] std::vector<int> missing() const;  // world ranks that have not come
  [[nodiscard]] const std::string& title() const { return title_; }
  void wake();

  mutable std::mutex mutex;
  std::condition_variable changed;

 private:
  [[nodiscard]] std::string find_mismatch(int member, const Request& request) const;
  void finish();
  void plan_work();
  void plan_reduce(bool scatter);
  void plan_all_gather();
  void plan_all_to_all();
  void plan_all_to_all_v();
  void plan_copy(int from, int to, int64_t from_byte, int64_t to_byte, int64_t bytes);

  std::vector<int> world_ranks_;
  std::vector<std::optional<Request>> requests_;  // by member
  std::vector<bool> came_;
  int arrived_ = 0, first_ = -1;
  std::string title_;
  std::atomic<bool> ready_ = false, done_ = false;
  std::vector<std::function<void()>> pieces_;
  std::atomic<size_t> next_piece_ = 0, finished_pieces_ = 0;
};

}  // namespace capstan::comm
