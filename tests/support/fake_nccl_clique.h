// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The ranks of one communicator of the fake NCCL: where their operations meet. run() and exchange()
// are called by the threads of streams.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "capstan/comm/nccl_api.h"

namespace capstan::test {

struct NcclCollective {
  enum class Kind { kAllReduce, kAllGather, kReduceScatter, kBroadcast };
  Kind kind = Kind::kAllReduce;
  comm::NcclType type = comm::NcclType::kUint8;
  comm::NcclReduce reduce = comm::NcclReduce::kSum;
  int root = 0;
  size_t count = 0;
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
  bool is_recorded = false;  // launched by a graph

  [[nodiscard]] bool fits(const NcclCollective& other) const;
};

struct NcclMessage {
  bool is_send = true;
  int peer = 0;
  size_t bytes = 0;
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
  bool is_recorded = false;
};

[[nodiscard]] size_t size_of(comm::NcclType type);

struct NcclClique {
  explicit NcclClique(int ranks);

  // Returns when all ranks have joined; false when that will never be.
  [[nodiscard]] bool join();
  void shut_down();
  void run(int rank, const NcclCollective& collective);
  void exchange(int rank, const std::vector<NcclMessage>& messages);
  void hang(int rank);
  void abort(int rank);  // returns when nothing of the rank runs any more
  [[nodiscard]] comm::NcclResult error() const;

 private:
  struct Meeting {
    std::vector<std::optional<NcclCollective>> came;
    int arrived = 0, left = 0;
    bool is_done = false;
  };
  struct Letter {
    const std::byte* data;
    size_t bytes;
    bool is_recorded = false;
    bool is_taken = false;
  };
  using Box = std::deque<std::shared_ptr<Letter>>;
  void compute(const Meeting& meeting);
  bool receive(std::unique_lock<std::mutex>& lock, int rank, const NcclMessage& message);

  const int size_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int joined_ = 0;
  bool is_shut_ = false;
  std::vector<bool> aborted_;
  std::vector<int> running_;
  std::vector<int64_t> next_;  // number of the rank's next collective
  std::map<int64_t, Meeting> meetings_;
  std::map<std::pair<int, int>, Box> boxes_;  // by sender and receiver
  comm::NcclResult error_ = comm::NcclResult::kSuccess;
};

}  // namespace capstan::test
