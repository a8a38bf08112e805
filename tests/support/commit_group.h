// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A commit group over threads of this process, for tests and the fault driver.
#pragma once
#include <barrier>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "capstan/checkpoint/commit.h"

namespace capstan::checkpoint {

struct ThreadGroupBoard {
  explicit ThreadGroupBoard(int n) : texts(static_cast<size_t>(n)), barrier(n) {}
  std::vector<std::string> texts;
  std::barrier<> barrier;
};

class ThreadGroup final : public CommitGroup {
 public:
  ThreadGroup(int rank, ThreadGroupBoard& board) : rank_(rank), board_(board) {}
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(board_.texts.size()); }
  std::vector<std::string> gather(const std::string& mine) override {
    board_.texts[static_cast<size_t>(rank_)] = mine;
    board_.barrier.arrive_and_wait();
    std::vector<std::string> all = board_.texts;
    board_.barrier.arrive_and_wait();
    return all;
  }

 private:
  int rank_;
  ThreadGroupBoard& board_;
};

// Runs fn on n threads. fn must make the same gather calls on every rank.
inline void run_with_group(int n, const std::function<void(CommitGroup&)>& fn) {
  ThreadGroupBoard board(n);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank)
    threads.emplace_back([&, rank] {
      ThreadGroup group(rank, board);
      fn(group);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace capstan::checkpoint
