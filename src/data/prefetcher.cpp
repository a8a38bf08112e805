// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/prefetcher.h"

#include <fmt/format.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"

namespace capstan::data {

struct Prefetcher::State {
  Read read;
  PrefetchOptions options;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<SampleBatch> ready;
  std::exception_ptr failure;  // of the first step that is neither in `ready` nor handed out
  bool is_stopping = false;
  int64_t next_step = 0;
  double wait_ms = 0;
  std::thread thread;  // last: it uses everything above

  void run(int rank) {
    log::set_thread_rank(rank);
    try {
      for (int64_t step = options.first_step; step < options.end_step; ++step) {
        {
          std::unique_lock lock(mutex);
          changed.wait(lock, [&] { return is_stopping || std::ssize(ready) < options.depth; });
          if (is_stopping) return;
        }
        SampleBatch batch = read(step);
        const std::lock_guard lock(mutex);
        ready.push_back(std::move(batch));
        changed.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
      changed.notify_all();
    }
  }
};

Prefetcher::Prefetcher(Read read, const PrefetchOptions& options)
    : state_(std::make_unique<State>()) {
  CAPSTAN_CHECK(options.depth > 0 && options.first_step >= 0, "depth {}, first step {}",
                options.depth, options.first_step);
  state_->read = std::move(read);
  state_->options = options;
  state_->next_step = options.first_step;
  state_->thread =
      std::thread([state = state_.get(), rank = log::thread_rank()] { state->run(rank); });
}

Prefetcher::~Prefetcher() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_stopping = true;
  }
  state_->changed.notify_all();
  state_->thread.join();
}

SampleBatch Prefetcher::next() {
  State& s = *state_;
  const int64_t begin_ns = monotonic_ns();
  std::unique_lock lock(s.mutex);
  CAPSTAN_CHECK(s.next_step < s.options.end_step, "step {} is past the end {}", s.next_step,
                s.options.end_step);
  const auto is_there = [&] { return !s.ready.empty() || s.failure; };
  if (s.options.timeout_s <= 0) {
    s.changed.wait(lock, is_there);
  } else if (!s.changed.wait_for(lock, std::chrono::duration<double>(s.options.timeout_s),
                                 is_there)) {
    throw EnvError(
        ErrorText{.module = "data",
                  .what = fmt::format("reading the samples of step {}", s.next_step),
                  .got = fmt::format("nothing for {} s", s.options.timeout_s),
                  .need = "them by the deadline of a step",
                  .why = "the disk or network that holds the token files does not answer"});
  }
  s.wait_ms = static_cast<double>(monotonic_ns() - begin_ns) * 1e-6;
  if (s.ready.empty()) std::rethrow_exception(s.failure);
  SampleBatch batch = std::move(s.ready.front());
  s.ready.pop_front();
  ++s.next_step;
  s.changed.notify_all();
  return batch;
}

int64_t Prefetcher::step() const {
  const std::lock_guard lock(state_->mutex);
  return state_->next_step;
}

double Prefetcher::wait_ms() const {
  const std::lock_guard lock(state_->mutex);
  return state_->wait_ms;
}

}  // namespace capstan::data
