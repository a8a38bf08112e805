// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/communicator.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/comm/backend.h"
#include "comm/request_check_internal.h"
#include "comm/single_backend_internal.h"

namespace capstan::comm {
namespace {

constexpr double kDefaultTimeoutSeconds = 600;

// Autograd and version counters stay out of it: the backends see plain memory.
Tensor plain(const Tensor& tensor) { return tensor.defined() ? tensor.detach() : tensor; }

// Every member of a subgroup must have named the same members.
void check_partition(const Communicator& parent, const std::string& axis,
                     const std::vector<int>& members) {
  const int64_t n = parent.size();
  const Tensor mine_N = at::full({n}, -1, at::kLong);
  for (size_t i = 0; i < members.size(); ++i) mine_N[static_cast<int64_t>(i)] = members[i];
  const Tensor all_NN = at::empty({n, n}, at::kLong);
  parent.control().all_gather(all_NN, mine_N).wait();
  for (const int member : members) {
    if (all_NN[member].equal(mine_N)) continue;
    const Tensor theirs_N = all_NN[member];
    std::vector<int64_t> other;
    for (int64_t i = 0; i < n && theirs_N[i].item<int64_t>() >= 0; ++i)
      other.push_back(theirs_N[i].item<int64_t>());
    throw InternalError(ErrorText{
        .module = "comm",
        .what = fmt::format("splitting {} into axis {}", parent.axis(), axis),
        .got = fmt::format("members [{}] on rank {} and [{}] on rank {}", fmt::join(members, ","),
                           parent.rank(), fmt::join(other, ","), member),
        .need = "the same members on every member"});
  }
}

}  // namespace

void Work::wait() {
  if (const auto state = std::exchange(state_, nullptr)) state->wait();
}

bool Work::is_done() const { return state_ == nullptr || state_->is_done(); }

Communicator::Communicator()
    : Communicator(std::make_shared<SingleBackend>(
                       Group{}, std::make_shared<RankState>(0, kDefaultTimeoutSeconds)),
                   "single") {}

Communicator::Communicator(std::shared_ptr<Backend> backend, std::string axis)
    : backend_(std::move(backend)), axis_(std::move(axis)) {
  CAPSTAN_CHECK(backend_ != nullptr, "a communicator needs a backend");
}

int Communicator::rank() const { return backend_->group().rank; }
int Communicator::size() const { return backend_->group().size(); }
int Communicator::world_rank() const { return backend_->group().world_rank(); }
const std::vector<int>& Communicator::ranks() const { return backend_->group().ranks; }
std::string Communicator::backend_name() const { return backend_->name(); }

Work Communicator::issue(Request request) const {
  request.axis = axis_;
  check_request(request, backend_->group(), backend_->device());
  if (size() == 1) {
    run_alone(request);
    return {};
  }
  request.in = plain(request.in);
  request.out = plain(request.out);
  ledger().add(axis_, name_of(request.op), request.bytes());
  return Work(backend_->issue(std::move(request)));
}

Work Communicator::all_reduce(const Tensor& inout, ReduceOp op) const {
  return issue({.op = Op::kAllReduce, .out = inout, .in = inout, .reduce = op});
}

Work Communicator::all_gather(const Tensor& out, const Tensor& in) const {
  return issue({.op = Op::kAllGather, .out = out, .in = in});
}

Work Communicator::reduce_scatter(const Tensor& out, const Tensor& in, ReduceOp op) const {
  return issue({.op = Op::kReduceScatter, .out = out, .in = in, .reduce = op});
}

Work Communicator::all_to_all(const Tensor& out, const Tensor& in) const {
  return issue({.op = Op::kAllToAll, .out = out, .in = in});
}

Work Communicator::all_to_all_v(const Tensor& out, const Tensor& in, std::vector<int64_t> out_rows,
                                std::vector<int64_t> in_rows) const {
  return issue({.op = Op::kAllToAllV,
                .out = out,
                .in = in,
                .out_rows = std::move(out_rows),
                .in_rows = std::move(in_rows)});
}

Work Communicator::broadcast(const Tensor& inout, int root) const {
  return issue({.op = Op::kBroadcast, .out = inout, .in = inout, .peer = root});
}

Work Communicator::barrier() const { return issue({.op = Op::kBarrier}); }

Work Communicator::send(const Tensor& in, int to) const {
  return issue({.op = Op::kSend, .in = in, .peer = to});
}

Work Communicator::recv(const Tensor& out, int from) const {
  return issue({.op = Op::kRecv, .out = out, .peer = from});
}

Communicator Communicator::split(const std::string& axis, const std::vector<int>& members) const {
  CAPSTAN_CHECK(std::is_sorted(members.begin(), members.end()) &&
                    std::adjacent_find(members.begin(), members.end()) == members.end(),
                "the members [{}] of axis {} are not in ascending order", fmt::join(members, ","),
                axis);
  CAPSTAN_CHECK(std::binary_search(members.begin(), members.end(), rank()),
                "rank {} is not among the members [{}] of its own group on axis {}", rank(),
                fmt::join(members, ","), axis);
  CAPSTAN_CHECK(members.front() >= 0 && members.back() < size(),
                "members [{}] of axis {} do not exist: {} has {} ranks", fmt::join(members, ","),
                axis, axis_, size());
  if (size() > 1) check_partition(*this, axis, members);
  auto backend = backend_->split(
      axis, members);  // also where the group is one rank: splits count alike everywhere
  return {members.size() > 1
              ? std::move(backend)
              : std::make_shared<SingleBackend>(subgroup_of(backend_->group(), members), backend_),
          axis};
}

void Communicator::launch(const Ledger::Table& traffic, const std::function<void()>& launch) const {
  ledger().add(traffic);
  if (traffic.empty()) return launch();
  std::vector<std::string> operations;
  for (const auto& [name, sum] : traffic)
    operations.push_back(fmt::format("{} x {}", name, sum.calls));
  backend_->launch(fmt::format("{}", fmt::join(operations, ", ")), launch);
}

void Communicator::check_job() const { backend_->check_job(); }

Communicator Communicator::renamed(std::string axis) const { return {backend_, std::move(axis)}; }

void Communicator::set_timeout(double seconds) const {
  CAPSTAN_CHECK(seconds > 0, "a timeout of {} s ends every wait at once", seconds);
  backend_->state().timeout_s = seconds;
}

double Communicator::timeout() const { return backend_->state().timeout_s; }
void Communicator::abort(const std::string& reason) const noexcept { backend_->abort(reason); }
bool Communicator::is_aborted() const { return backend_->is_aborted(); }
Ledger& Communicator::ledger() const { return backend_->state().ledger; }
FlightRecorder& Communicator::flight_recorder() const { return backend_->state().recorder; }

}  // namespace capstan::comm
