// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "fiber.h"
#include "platform.h"

namespace capstan::kernels::simt {
namespace {

constexpr int kMostThreads = 1024, kLanes = 32;
constexpr int64_t kMostSharedBytes = 48 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every float type
constexpr size_t kGuardBytes = 64;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  State state = State::kReady;
  int line = 0;
};
struct Warp {
  int arrived = 0;
  uint64_t brought[kLanes] = {}, taken[kLanes] = {};
};

uint64_t order_seed = 0;

// Threads may be in the middle of a kernel when a fault is found, so the fault is kept until the
// scheduler runs again and then thrown from its stack.
class Block {
 public:
  void run(const char* kernel, const LaunchShape& shape, int64_t block,
           const std::function<void()>& body, std::mt19937_64* shuffle);
  void sync(int line);
  const uint64_t* exchange(uint32_t mask, uint64_t word, int line);
  void* shared() { return shared_.data(); }
  void run_thread();  // on a fiber
  [[noreturn]] void fail(std::string why);

 private:
  void prepare(const LaunchShape& shape);
  void turn();
  void finish();
  void wait(State state, int line);
  void throw_fault(const std::string& why) const;
  [[nodiscard]] std::string stuck() const;
  void check_lines(size_t first, size_t count, const char* what);
  void release(size_t first, size_t count) {
    for (size_t t = first; t < first + count; ++t) threads_[t].state = State::kReady;
  }

  const char* kernel_ = "";
  int64_t block_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<size_t> order_;
  std::vector<unsigned char> shared_;
  size_t shared_bytes_ = 0, now_ = 0, at_barrier_ = 0, live_ = 0;
  std::optional<std::string> fault_;
};

Block& block() {
  static Block value;
  return value;
}
void start_thread() { block().run_thread(); }

void Block::prepare(const LaunchShape& shape) {
  const auto count = static_cast<size_t>(shape.threads);
  while (fibers_.size() < count) fibers_.emplace_back();
  threads_.assign(count, {});
  warps_.assign(count / kLanes, {});
  order_.resize(count);
  std::iota(order_.begin(), order_.end(), size_t{0});
  for (size_t t = 0; t < count; ++t) fibers_[t].reset(start_thread);
  shared_bytes_ = static_cast<size_t>(shape.shared_bytes);
  shared_.assign(shared_bytes_ + kGuardBytes, kPoison);
  at_barrier_ = 0;
  live_ = count;
  fault_.reset();
}

void Block::run(const char* kernel, const LaunchShape& shape, int64_t index,
                const std::function<void()>& body, std::mt19937_64* shuffle) {
  kernel_ = kernel;
  block_ = index;
  body_ = &body;
  prepare(shape);
  blockIdx.x = static_cast<unsigned>(index);
  while (live_ > 0) {
    if (shuffle) std::shuffle(order_.begin(), order_.end(), *shuffle);
    turn();
  }
  finish();
}

void Block::turn() {
  bool has_moved = false;
  for (const size_t t : order_) {
    if (threads_[t].state != State::kReady) continue;
    has_moved = true;
    now_ = t;
    threadIdx.x = static_cast<unsigned>(t);
    fibers_[t].resume();
    if (fault_) throw_fault(*fault_);
  }
  if (!has_moved) throw_fault(stuck());
}

void Block::finish() {
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (shared_[shared_bytes_ + i] != kPoison)
      throw_fault(fmt::format("something wrote {} bytes past its dynamic shared memory", i));
  for (size_t t = 0; t < threads_.size(); ++t)
    if (fibers_[t].has_overflowed()) throw_fault(fmt::format("thread {} overflowed its stack", t));
}

void Block::run_thread() {
  (*body_)();
  threads_[now_].state = State::kDone;
  --live_;
  fibers_[now_].pause();
}

void Block::wait(State state, int line) {
  threads_[now_].state = state;
  threads_[now_].line = line;
  const size_t self = now_;
  fibers_[self].pause();
}

void Block::fail(std::string why) {
  fault_ = fmt::format("thread {}: {}", now_, why);
  fibers_[now_].pause();
  std::abort();  // never resumed
}

void Block::check_lines(size_t first, size_t count, const char* what) {
  for (size_t t = first; t < first + count; ++t)
    if (threads_[t].line != threads_[first].line)
      fail(fmt::format("a {} joins threads {} and {} at lines {} and {}", what, first, t,
                       threads_[first].line, threads_[t].line));
}

void Block::sync(int line) {
  threads_[now_].line = line;
  if (++at_barrier_ < threads_.size()) return wait(State::kAtBarrier, line);
  check_lines(0, threads_.size(), "barrier");
  at_barrier_ = 0;
  release(0, threads_.size());
  wait(State::kReady, line);
}

const uint64_t* Block::exchange(uint32_t mask, uint64_t word, int line) {
  if (mask != 0xffffffffu) fail(fmt::format("a warp operation of part of the warp, {:#x}", mask));
  Warp& warp = warps_[now_ / kLanes];
  const size_t first = now_ / kLanes * kLanes;
  warp.brought[now_ % kLanes] = word;
  threads_[now_].line = line;
  if (++warp.arrived < kLanes) {
    wait(State::kAtWarp, line);
    return warp.taken;
  }
  check_lines(first, kLanes, "warp operation");
  std::copy(std::begin(warp.brought), std::end(warp.brought), std::begin(warp.taken));
  warp.arrived = 0;
  release(first, kLanes);
  return warp.taken;
}

std::string Block::stuck() const {
  const auto count = [&](State state) {
    return std::count_if(threads_.begin(), threads_.end(),
                         [&](const Thread& t) { return t.state == state; });
  };
  std::string text =
      fmt::format("{} threads wait at a barrier, {} at a warp operation, {} ended",
                  count(State::kAtBarrier), count(State::kAtWarp), count(State::kDone));
  for (size_t t = 0; t < threads_.size(); ++t)
    if (threads_[t].state == State::kAtBarrier || threads_[t].state == State::kAtWarp)
      return text + fmt::format("; thread {} at line {}", t, threads_[t].line);
  return text;
}

void Block::throw_fault(const std::string& why) const {
  throw InternalError(ErrorText{.module = "simt",
                                .what = fmt::format("running block {} of {}", block_, kernel_),
                                .got = why,
                                .need = {},
                                .why = {},
                                .fix = {}});
}

}  // namespace

void set_order(uint64_t seed) { order_seed = seed; }
void sync_block(int line) { block().sync(line); }
const uint64_t* exchange_words(uint32_t mask, uint64_t word, int line) {
  return block().exchange(mask, word, line);
}
void* dynamic_shared() { return block().shared(); }
void fail_thread(const char* why) { block().fail(why); }

void run_grid(const char* kernel, const LaunchShape& shape, const std::function<void()>& thread) {
  static std::mutex one_launch;
  const std::scoped_lock lock(one_launch);
  CAPSTAN_CHECK(shape.blocks >= 1 && shape.blocks <= INT32_MAX, "{}: {} blocks", kernel,
                shape.blocks);
  CAPSTAN_CHECK(shape.threads >= 1 && shape.threads <= kMostThreads && shape.threads % kLanes == 0,
                "{}: {} threads", kernel, shape.threads);
  CAPSTAN_CHECK(shape.shared_bytes >= 0 && shape.shared_bytes <= kMostSharedBytes,
                "{}: {} bytes of shared memory", kernel, shape.shared_bytes);
  gridDim.x = static_cast<unsigned>(shape.blocks);
  blockDim.x = static_cast<unsigned>(shape.threads);
  std::vector<int64_t> blocks(static_cast<size_t>(shape.blocks));
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  std::mt19937_64 shuffle(order_seed);
  if (order_seed != 0) std::shuffle(blocks.begin(), blocks.end(), shuffle);
  for (const int64_t index : blocks)
    block().run(kernel, shape, index, thread, order_seed != 0 ? &shuffle : nullptr);
}

}  // namespace capstan::kernels::simt
