// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a backend implements. Users hold Communicators; this header is for backends (also those in
// plug-ins).
#pragma once
#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "capstan/comm/communicator.h"

namespace capstan::comm {

enum class Op {
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kAllToAllV,
  kBroadcast,
  kBarrier,
  kSend,
  kRecv
};
[[nodiscard]] const char* name_of(Op op);
[[nodiscard]] const char* name_of(ReduceOp op);

// One call, checked by Communicator: tensors contiguous, all on the CPU or all on the backend's
// device, sizes consistent on this rank.
struct Request {
  Op op = Op::kBarrier;
  Tensor out, in;  // in-place operations: the same tensor; undefined where an operation has none
  ReduceOp reduce = ReduceOp::kSum;
  int peer = -1;  // root, receiver or sender, in group ranks
  std::vector<int64_t> out_rows, in_rows;
  std::string axis;  // the name that traffic and messages carry

  [[nodiscard]] int64_t bytes() const;          // as the ledger counts
  [[nodiscard]] const Tensor& payload() const;  // in, or out where there is no in
  [[nodiscard]] bool is_point_to_point() const { return op == Op::kSend || op == Op::kRecv; }
};
// "all_reduce sum fp32 x 4,096"; equal on all ranks of a correct collective (all_to_all_v: without
// sizes).
[[nodiscard]] std::string describe(const Request& request);

class WaitBook;

class WorkState {
 public:
  virtual ~WorkState() = default;
  virtual void wait() = 0;
  [[nodiscard]] virtual bool is_done() const = 0;
};

// What the communicators of one rank share.
struct RankState {
  RankState(int world_rank, double timeout) : rank(world_rank), timeout_s(timeout) {}
  const int rank;
  std::atomic<double> timeout_s;
  Ledger ledger;
  FlightRecorder recorder;
};

struct Group {
  std::vector<int> ranks = {0};  // world ranks of the members, in group order
  int rank = 0;                  // of this rank among them
  [[nodiscard]] int size() const { return static_cast<int>(ranks.size()); }
  [[nodiscard]] int world_rank() const { return ranks[static_cast<size_t>(rank)]; }
  [[nodiscard]] std::string text() const;  // "[0,1,2]"; long lists are shortened
};

class Backend {
 public:
  Backend(Group group, std::shared_ptr<RankState> state)
      : group_(std::move(group)), state_(std::move(state)) {}
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  [[nodiscard]] virtual const char* name() const = 0;
  [[nodiscard]] virtual std::shared_ptr<WorkState> issue(Request request) = 0;
  // `members`: ranks of this group, checked to form a partition over the callers.
  [[nodiscard]] virtual std::shared_ptr<Backend> split(const std::string& axis,
                                                       const std::vector<int>& members) = 0;
  // Runs `launch` under the group's deadline, where the backend has operations that a graph can
  // hold; `what` names those.
  virtual void launch(const std::string& what, const std::function<void()>& launch);
  // Throws what ended the job, where wait() does not wait for results.
  virtual void check_job() {}
  virtual void abort(const std::string& reason) noexcept = 0;
  [[nodiscard]] virtual bool is_aborted() const = 0;
  // Where tensors may live besides the CPU.
  [[nodiscard]] virtual c10::Device device() const { return c10::DeviceType::CPU; }
  // What backends built on this one report to; null where nobody waits.
  [[nodiscard]] virtual std::shared_ptr<WaitBook> wait_book() const { return nullptr; }

  [[nodiscard]] const Group& group() const { return group_; }
  [[nodiscard]] RankState& state() const { return *state_; }
  [[nodiscard]] const std::shared_ptr<RankState>& shared_state() const { return state_; }

 private:
  Group group_;
  std::shared_ptr<RankState> state_;
};

// The members of a subgroup as a Group of world ranks.
[[nodiscard]] Group subgroup_of(const Group& parent, const std::vector<int>& members);

}  // namespace capstan::comm
