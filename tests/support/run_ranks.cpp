// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/run_ranks.h"

#include <fmt/format.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "capstan/comm/threads.h"

namespace capstan::test {
namespace {

// Ends the program when the ranks are not through in time.
class Watchdog {
 public:
  Watchdog(int n, double deadline_s)
      : worlds_(static_cast<size_t>(n)), thread_([this, deadline_s] { watch(deadline_s); }) {}
  ~Watchdog() {
    {
      std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void begin(const comm::Communicator& world) {
    std::lock_guard lock(mutex_);
    worlds_[static_cast<size_t>(world.rank())] = world;
  }
  void end(int rank) {
    std::lock_guard lock(mutex_);
    worlds_[static_cast<size_t>(rank)].reset();
  }

 private:
  void watch(double deadline_s) {
    std::unique_lock lock(mutex_);
    if (changed_.wait_for(lock, std::chrono::duration<double>(deadline_s),
                          [this] { return is_over_; }))
      return;
    fmt::print(stderr, "run_ranks: not through after {:g} s\n", deadline_s);
    for (size_t rank = 0; rank < worlds_.size(); ++rank)
      if (worlds_[rank])
        fmt::print(stderr, "  rank {} is late; operations: {}\n", rank,
                   worlds_[rank]->flight_recorder().open_text());
    std::fflush(stderr);
    std::_Exit(1);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_over_ = false;
  std::vector<std::optional<comm::Communicator>> worlds_;
  std::thread thread_;
};

}  // namespace

void run_ranks(int n, const std::function<void(comm::Communicator world)>& fn, double deadline_s) {
  // Waits end a little sooner than the watchdog, so that hangs inside comm explain themselves.
  const double timeout_s = deadline_s * 0.8;
  Watchdog watchdog(n, deadline_s);
  comm::run_thread_ranks(n,
                         [&](comm::Communicator world) {
                           const int rank = world.rank();
                           watchdog.begin(world);
                           struct End {
                             Watchdog& dog;
                             int rank;
                             ~End() { dog.end(rank); }
                           } end{watchdog, rank};
                           fn(std::move(world));
                         },
                         {.timeout_s = timeout_s, .threads_per_rank = 1});
}

}  // namespace capstan::test
