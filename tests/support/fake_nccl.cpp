// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_nccl.h"

#include <fmt/format.h>

#include <condition_variable>
#include <cstring>

#include "support/fake_nccl_clique.h"

namespace capstan::test {

using comm::NcclCall;
using comm::NcclComm;
using comm::NcclReduce;
using comm::NcclResult;

// What a handle points to.
struct FakeComm {
  std::shared_ptr<NcclClique> clique;
  int rank = 0;        // in the communicator
  int world_rank = 0;  // whose api made it
  int queued = 0;      // jobs that are not done
  int graphs = 0;      // operations that graphs hold
  bool is_open = true;
};

struct FakeFabric::State {
  mutable std::mutex mutex;
  std::condition_variable graph_gone;
  bool is_shut = false;
  uint64_t next_id = 1;
  std::map<uint64_t, std::shared_ptr<NcclClique>> cliques;  // by unique identifier
  std::vector<std::unique_ptr<FakeComm>> comms;
  std::map<std::pair<int, std::string>, NcclResult> failures;
  std::map<std::pair<int, std::string>, int> calls;
  std::map<int, NcclResult> async_errors;
  std::map<int, int64_t> hanging;  // how many of the rank's operations come before
  std::vector<std::string> misuses;

  void misuse(const FakeComm& comm, const char* what) {
    misuses.push_back(fmt::format("rank {}: {}", comm.world_rank, what));
  }
};

FakeFabric::FakeFabric() : state_(std::make_unique<State>()) {}
FakeFabric::~FakeFabric() = default;

void FakeFabric::fail_next(int rank, const std::string& call, NcclResult result) {
  std::lock_guard lock(state_->mutex);
  state_->failures[{rank, call}] = result;
}

void FakeFabric::set_async_error(int rank, NcclResult error) {
  std::lock_guard lock(state_->mutex);
  state_->async_errors[rank] = error;
}

void FakeFabric::hang_next(int rank, int64_t after) {
  std::lock_guard lock(state_->mutex);
  state_->hanging[rank] = after;
}

void FakeFabric::shut_down() {
  std::lock_guard lock(state_->mutex);
  state_->is_shut = true;
  for (const auto& [id, clique] : state_->cliques) clique->shut_down();
}

int FakeFabric::made() const {
  std::lock_guard lock(state_->mutex);
  return static_cast<int>(state_->comms.size());
}

int FakeFabric::open() const {
  std::lock_guard lock(state_->mutex);
  int count = 0;
  for (const auto& comm : state_->comms) count += comm->is_open ? 1 : 0;
  return count;
}

std::vector<std::string> FakeFabric::misuses() const {
  std::lock_guard lock(state_->mutex);
  return state_->misuses;
}

int FakeFabric::calls(int rank, const std::string& call) const {
  std::lock_guard lock(state_->mutex);
  const auto found = state_->calls.find({rank, call});
  return found == state_->calls.end() ? 0 : found->second;
}

struct FakeNccl::Operation {
  bool is_collective = true;
  NcclCollective collective;
  NcclMessage message;
};

struct FakeNccl::Pending {
  Operation operation;
  FakeComm* comm = nullptr;
  device::Stream stream;
};

FakeNccl::FakeNccl(std::shared_ptr<FakeFabric> fabric, int rank, Options options)
    : fabric_(std::move(fabric)), rank_(rank), options_(std::move(options)) {}

FakeNccl::~FakeNccl() = default;

NcclResult FakeNccl::begin(const char* call) {
  auto& state = *fabric_->state_;
  std::lock_guard lock(state.mutex);
  ++state.calls[{rank_, call}];
  const auto found = state.failures.find({rank_, call});
  if (found == state.failures.end()) return NcclResult::kSuccess;
  const NcclResult result = found->second;
  state.failures.erase(found);
  return result;
}

NcclResult FakeNccl::get_unique_id(comm::NcclUniqueId& id) {
  if (const auto failed = begin("ncclGetUniqueId"); failed != NcclResult::kSuccess) return failed;
  std::lock_guard lock(fabric_->state_->mutex);
  const uint64_t number = fabric_->state_->next_id++;
  std::memcpy(id.bytes.data(), &number, sizeof(number));
  return NcclResult::kSuccess;
}

NcclResult FakeNccl::comm_init_rank(NcclComm& comm, int size, const comm::NcclUniqueId& id,
                                    int rank, const comm::NcclConfig& /*config*/) {
  const auto failed = begin("ncclCommInitRankConfig");
  if (failed != NcclResult::kSuccess) return failed;
  auto& state = *fabric_->state_;
  uint64_t number = 0;
  std::memcpy(&number, id.bytes.data(), sizeof(number));
  std::shared_ptr<NcclClique> clique;
  {
    std::lock_guard lock(state.mutex);
    if (state.is_shut) return NcclResult::kSystemError;
    auto& found = state.cliques[number];
    if (!found) found = std::make_shared<NcclClique>(size);
    clique = found;
  }
  if (!clique->join()) return NcclResult::kSystemError;
  std::lock_guard lock(state.mutex);
  state.comms.push_back(
      std::make_unique<FakeComm>(FakeComm{.clique = clique, .rank = rank, .world_rank = rank_}));
  comm.handle = state.comms.back().get();
  return NcclResult::kSuccess;
}

NcclResult FakeNccl::comm_finalize(NcclComm /*comm*/) { return begin("ncclCommFinalize"); }

NcclResult FakeNccl::comm_destroy(NcclComm comm) {
  if (const auto failed = begin("ncclCommDestroy"); failed != NcclResult::kSuccess) return failed;
  auto& fake = *static_cast<FakeComm*>(comm.handle);
  std::lock_guard lock(fabric_->state_->mutex);
  if (!fake.is_open) fabric_->state_->misuse(fake, "a communicator is destroyed twice");
  if (fake.queued > 0) fabric_->state_->misuse(fake, "a communicator is destroyed while in use");
  if (fake.graphs > 0) fabric_->state_->misuse(fake, "a communicator is destroyed before a graph");
  fake.is_open = false;
  return NcclResult::kSuccess;
}

NcclResult FakeNccl::comm_abort(NcclComm comm) {
  if (const auto failed = begin("ncclCommAbort"); failed != NcclResult::kSuccess) return failed;
  auto& fake = *static_cast<FakeComm*>(comm.handle);
  {
    std::lock_guard lock(fabric_->state_->mutex);
    if (!fake.is_open) fabric_->state_->misuse(fake, "a communicator that is gone is aborted");
    fake.is_open = false;
  }
  fake.clique->abort(fake.rank);
  std::unique_lock lock(fabric_->state_->mutex);
  fabric_->state_->graph_gone.wait(lock, [&] { return fake.graphs == 0; });
  return NcclResult::kSuccess;
}

NcclResult FakeNccl::comm_get_async_error(NcclComm comm, NcclResult& error) {
  auto& fake = *static_cast<FakeComm*>(comm.handle);
  error = fake.clique->error();
  std::lock_guard lock(fabric_->state_->mutex);
  const auto found = fabric_->state_->async_errors.find(rank_);
  if (found != fabric_->state_->async_errors.end()) error = found->second;
  if (!fake.is_open) fabric_->state_->misuse(fake, "a communicator that is gone is asked");
  return NcclResult::kSuccess;
}

NcclResult FakeNccl::add(Operation operation, const NcclCall& call) {
  auto* fake = static_cast<FakeComm*>(call.comm.handle);
  {
    std::lock_guard lock(fabric_->state_->mutex);
    if (!fake->is_open) {
      fabric_->state_->misuse(*fake, "a communicator that is gone is used");
      return NcclResult::kInvalidArgument;
    }
  }
  Pending pending{operation, fake, call.stream};
  std::unique_lock lock(mutex_);
  const auto group = groups_.find(std::this_thread::get_id());
  if (group != groups_.end()) {
    group->second.push_back(pending);
    return NcclResult::kSuccess;
  }
  lock.unlock();
  launch({pending});
  return NcclResult::kSuccess;
}

void FakeNccl::launch(std::vector<Pending> calls) {
  if (calls.empty()) return;
  FakeComm* const comm = calls.front().comm;
  std::shared_ptr<void> of_graph(nullptr, [comm, fabric = fabric_](void*) {
    const std::lock_guard lock(fabric->state_->mutex);
    --comm->graphs;
    fabric->state_->graph_gone.notify_all();
  });
  {
    const std::lock_guard lock(fabric_->state_->mutex);
    ++comm->graphs;
  }
  const device::Stream stream = calls.front().stream;
  if (options_.record && options_.record(stream, [this, calls, of_graph] { start(calls, true); }))
    return;
  start(std::move(calls), false);
}

// Messages of a group run together, collectives one after the other.
void FakeNccl::start(std::vector<Pending> calls, bool is_recorded) {
  FakeComm* const comm = calls.front().comm;
  const auto translate = [this](const void* p) {
    return static_cast<std::byte*>(options_.host_address(const_cast<void*>(p)));
  };
  for (Pending& call : calls) {
    auto& [is_collective, collective, message] = call.operation;
    collective.in = translate(collective.in);
    collective.out = translate(collective.out);
    message.in = translate(message.in);
    message.out = translate(message.out);
    collective.is_recorded = message.is_recorded = is_recorded;
  }
  bool hangs = false;
  {
    std::lock_guard lock(fabric_->state_->mutex);
    const auto hanging = fabric_->state_->hanging.find(rank_);
    hangs = hanging != fabric_->state_->hanging.end() && hanging->second-- == 0;
    if (hangs) fabric_->state_->hanging.erase(hanging);
    ++comm->queued;
  }
  const device::Stream stream = calls.front().stream;
  options_.queue(stream, [comm, hangs, fabric = fabric_, calls = std::move(calls)] {
    std::vector<NcclMessage> messages;
    if (hangs) comm->clique->hang(comm->rank);
    for (const Pending& call : calls)
      if (call.operation.is_collective)
        comm->clique->run(comm->rank, call.operation.collective);
      else
        messages.push_back(call.operation.message);
    if (!messages.empty()) comm->clique->exchange(comm->rank, messages);
    std::lock_guard lock(fabric->state_->mutex);
    --comm->queued;
  });
}

NcclResult FakeNccl::all_reduce(const void* in, void* out, NcclReduce reduce,
                                const NcclCall& call) {
  if (const auto failed = begin("ncclAllReduce"); failed != NcclResult::kSuccess) return failed;
  Operation operation;
  operation.collective = {.kind = NcclCollective::Kind::kAllReduce,
                          .type = call.type,
                          .reduce = reduce,
                          .count = call.count,
                          .in = static_cast<const std::byte*>(in),
                          .out = static_cast<std::byte*>(out)};
  return add(operation, call);
}

NcclResult FakeNccl::all_gather(const void* in, void* out, const NcclCall& call) {
  if (const auto failed = begin("ncclAllGather"); failed != NcclResult::kSuccess) return failed;
  Operation operation;
  operation.collective = {.kind = NcclCollective::Kind::kAllGather,
                          .type = call.type,
                          .count = call.count,
                          .in = static_cast<const std::byte*>(in),
                          .out = static_cast<std::byte*>(out)};
  return add(operation, call);
}

NcclResult FakeNccl::reduce_scatter(const void* in, void* out, NcclReduce reduce,
                                    const NcclCall& call) {
  const auto failed = begin("ncclReduceScatter");
  if (failed != NcclResult::kSuccess) return failed;
  Operation operation;
  operation.collective = {.kind = NcclCollective::Kind::kReduceScatter,
                          .type = call.type,
                          .reduce = reduce,
                          .count = call.count,
                          .in = static_cast<const std::byte*>(in),
                          .out = static_cast<std::byte*>(out)};
  return add(operation, call);
}

NcclResult FakeNccl::broadcast(const void* in, void* out, int root, const NcclCall& call) {
  if (const auto failed = begin("ncclBroadcast"); failed != NcclResult::kSuccess) return failed;
  Operation operation;
  operation.collective = {.kind = NcclCollective::Kind::kBroadcast,
                          .type = call.type,
                          .root = root,
                          .count = call.count,
                          .in = static_cast<const std::byte*>(in),
                          .out = static_cast<std::byte*>(out)};
  return add(operation, call);
}

NcclResult FakeNccl::send(const void* in, int to, const NcclCall& call) {
  if (const auto failed = begin("ncclSend"); failed != NcclResult::kSuccess) return failed;
  Operation operation{.is_collective = false, .collective = {}, .message = {}};
  operation.message = {.is_send = true,
                       .peer = to,
                       .bytes = call.count * size_of(call.type),
                       .in = static_cast<const std::byte*>(in)};
  return add(operation, call);
}

NcclResult FakeNccl::recv(void* out, int from, const NcclCall& call) {
  if (const auto failed = begin("ncclRecv"); failed != NcclResult::kSuccess) return failed;
  Operation operation{.is_collective = false, .collective = {}, .message = {}};
  operation.message = {.is_send = false,
                       .peer = from,
                       .bytes = call.count * size_of(call.type),
                       .out = static_cast<std::byte*>(out)};
  return add(operation, call);
}

NcclResult FakeNccl::group_start() {
  if (const auto failed = begin("ncclGroupStart"); failed != NcclResult::kSuccess) return failed;
  std::lock_guard lock(mutex_);
  groups_[std::this_thread::get_id()];
  return NcclResult::kSuccess;
}

NcclResult FakeNccl::group_end() {
  std::vector<Pending> calls;
  {
    std::lock_guard lock(mutex_);
    calls = std::move(groups_[std::this_thread::get_id()]);
    groups_.erase(std::this_thread::get_id());
  }
  if (const auto failed = begin("ncclGroupEnd"); failed != NcclResult::kSuccess) return failed;
  launch(std::move(calls));
  return NcclResult::kSuccess;
}

std::string FakeNccl::error_string(NcclResult result) {
  static constexpr const char* kTexts[] = {"no error",
                                           "unhandled cuda error",
                                           "unhandled system error",
                                           "internal error",
                                           "invalid argument",
                                           "invalid usage",
                                           "remote process exited or there was a network error",
                                           "operation in progress"};
  return kTexts[static_cast<size_t>(result)];
}

std::string FakeNccl::last_error(NcclComm /*comm*/) { return {}; }

}  // namespace capstan::test
