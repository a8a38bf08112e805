// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/threads.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <pthread.h>

#include <numeric>
#include <thread>

#include "capstan/base/check.h"
#include "capstan/base/log.h"
#include "capstan/device/threads.h"
#include "comm/thread_job_internal.h"

namespace capstan::comm {
namespace {

std::vector<Communicator> communicators_of(const std::shared_ptr<ThreadJob>& job, int n) {
  std::vector<int> ranks(static_cast<size_t>(n));
  std::iota(ranks.begin(), ranks.end(), 0);
  const auto place = std::make_shared<ThreadGroup>();
  std::vector<Communicator> worlds;
  for (int r = 0; r < n; ++r)
    worlds.emplace_back(
        std::make_shared<ThreadBackend>(job, place, Group{.ranks = ranks, .rank = r}), "world");
  return worlds;
}

void prepare_thread(int rank, int threads_per_rank) {
  log::set_thread_rank(rank);
  pthread_setname_np(pthread_self(), fmt::format("rank {}", rank).substr(0, 15).c_str());
  at::set_num_threads(threads_per_rank);
}

ThreadJob::Failure failure_of(int rank, const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const AbortedError& e) {
    return {rank, e.what(), failure, true};
  } catch (const std::exception& e) {
    return {rank, e.what(), failure, false};
  } catch (...) {
    return {rank, "an exception without text", failure, false};
  }
}

[[noreturn]] void rethrow(const ThreadJob::Failure& failure) {
  try {
    std::rethrow_exception(failure.exception);
  } catch (const std::exception&) {
    throw RankError(failure.rank, failure.text, failure.exception);
  }  // anything else passes as it is
}

}  // namespace

RankError::RankError(int rank, const std::string& message, std::exception_ptr cause)
    : Error(fmt::format("rank {}: {}", rank, message)), rank_(rank), cause_(std::move(cause)) {
  try {
    if (cause_) std::rethrow_exception(cause_);
  } catch (const Error& e) {
    exit_code_ = e.exit_code();
    run_exit_code_ = e.run_exit_code();
  } catch (...) {  // foreign exceptions keep the codes of a failed worker
  }
}

std::vector<Communicator> make_thread_communicators(int n, double timeout_s) {
  CAPSTAN_CHECK(n >= 1, "a job needs a rank, got {}", n);
  return communicators_of(std::make_shared<ThreadJob>(n, timeout_s), n);
}

void run_thread_ranks(int n, const std::function<void(Communicator world)>& fn,
                      const ThreadRanksOptions& options) {
  CAPSTAN_CHECK(n >= 1 && options.threads_per_rank >= 1,
                "a job needs a rank and a thread, got {} and {}", n, options.threads_per_rank);
  device::prepare_vector_math();
  const auto job = std::make_shared<ThreadJob>(n, options.timeout_s);
  auto worlds = communicators_of(job, n);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank)
    threads.emplace_back([&, rank, world = std::move(worlds[static_cast<size_t>(rank)])]() mutable {
      prepare_thread(rank, options.threads_per_rank);
      try {
        fn(std::move(world));
      } catch (...) {
        job->record_failure(failure_of(rank, std::current_exception()));
      }
      job->record_end(rank);
    });
  for (auto& thread : threads) thread.join();
  if (const auto failure = job->first_failure()) rethrow(*failure);
}

}  // namespace capstan::comm
