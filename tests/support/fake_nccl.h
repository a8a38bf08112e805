// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// NCCL over host memory for ranks that are threads. It is as strict as the real one where that
// matters: a rank's operation holds up its stream until its peers have come, a send until it was
// received, unless calls are grouped; communicators are made when all ranks have asked. Sums have
// the bits of the CPU backends. Operations that do not fit each other are an asynchronous error,
// also those of a graph and others: NCCL may choose different ways for them. A communicator that a
// graph holds is gone only when the graph is; its destruction before that is a misuse.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "capstan/comm/nccl_api.h"

namespace capstan::test {

// What the ranks of one job share.
class FakeFabric {
 public:
  FakeFabric();
  ~FakeFabric();

  // Faults. `call` as NCCL spells it: the rank's next such call fails.
  void fail_next(int rank, const std::string& call, comm::NcclResult result);
  // All communicators of the rank report this asynchronous error.
  void set_async_error(int rank, comm::NcclResult error);
  // The rank's next operation, or the one `after` so many, holds its stream up until its
  // communicator is aborted.
  void hang_next(int rank, int64_t after = 0);
  // Ends all calls that wait for ranks to make a communicator; later ones fail.
  void shut_down();

  [[nodiscard]] int made() const;                          // communicators, over all ranks
  [[nodiscard]] int open() const;                          // of them, not destroyed or aborted
  [[nodiscard]] std::vector<std::string> misuses() const;  // calls that NCCL does not allow
  [[nodiscard]] int calls(int rank, const std::string& call) const;

 private:
  friend class FakeNccl;
  struct State;
  std::unique_ptr<State> state_;
};

class FakeNccl final : public comm::NcclApi {
 public:
  struct Options {
    std::function<void(device::Stream, std::function<void()>)> queue;  // runs a job on a stream
    std::function<void*(void*)> host_address = [](void* p) { return p; };
    // Takes what a graph that is being recorded does on a stream; false outside of a capture.
    std::function<bool(device::Stream, std::function<void()>)> record;
  };
  // Of rank `rank`, for faults.
  FakeNccl(std::shared_ptr<FakeFabric> fabric, int rank, Options options);
  ~FakeNccl() override;

  comm::NcclResult get_unique_id(comm::NcclUniqueId& id) override;
  comm::NcclResult comm_init_rank(comm::NcclComm& comm, int size, const comm::NcclUniqueId& id,
                                  int rank, const comm::NcclConfig& config) override;
  comm::NcclResult comm_finalize(comm::NcclComm comm) override;
  comm::NcclResult comm_destroy(comm::NcclComm comm) override;
  comm::NcclResult comm_abort(comm::NcclComm comm) override;
  comm::NcclResult comm_get_async_error(comm::NcclComm comm, comm::NcclResult& error) override;
  comm::NcclResult all_reduce(const void* in, void* out, comm::NcclReduce reduce,
                              const comm::NcclCall& call) override;
  comm::NcclResult all_gather(const void* in, void* out, const comm::NcclCall& call) override;
  comm::NcclResult reduce_scatter(const void* in, void* out, comm::NcclReduce reduce,
                                  const comm::NcclCall& call) override;
  comm::NcclResult broadcast(const void* in, void* out, int root,
                             const comm::NcclCall& call) override;
  comm::NcclResult send(const void* in, int to, const comm::NcclCall& call) override;
  comm::NcclResult recv(void* out, int from, const comm::NcclCall& call) override;
  comm::NcclResult group_start() override;
  comm::NcclResult group_end() override;
  std::string error_string(comm::NcclResult result) override;
  std::string last_error(comm::NcclComm comm) override;

 private:
  struct Operation;
  struct Pending;
  [[nodiscard]] comm::NcclResult begin(const char* call);
  [[nodiscard]] comm::NcclResult add(Operation operation, const comm::NcclCall& call);
  void launch(std::vector<Pending> calls);
  void start(std::vector<Pending> calls, bool is_recorded);

  std::shared_ptr<FakeFabric> fabric_;
  int rank_;
  Options options_;
  std::mutex mutex_;
  std::map<std::thread::id, std::vector<Pending>> groups_;  // open ones
};

}  // namespace capstan::test
