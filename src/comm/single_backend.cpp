// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/single_backend_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/base/log.h"
#include "capstan/comm/world.h"
#include "comm/request_check_internal.h"

namespace capstan::comm {

std::shared_ptr<WorkState> SingleBackend::issue(Request request) {
  run_alone(request);
  return nullptr;
}

std::shared_ptr<Backend> SingleBackend::split(const std::string& /*axis*/,
                                              const std::vector<int>& members) {
  return parent_ ? std::make_shared<SingleBackend>(subgroup_of(group(), members), parent_)
                 : std::make_shared<SingleBackend>(subgroup_of(group(), members), shared_state());
}

void SingleBackend::abort(const std::string& reason) noexcept {
  if (parent_) return parent_->abort(reason);
  if (!aborted_.exchange(true)) log::error("comm", "the job is aborted: {}", reason);
}

std::shared_ptr<WorkState> FakeBackend::issue(Request request) {
  const int64_t id = state().recorder.add(
      {.axis = request.axis + group().text(), .sequence = issued_++, .what = describe(request)});
  const at::NoGradGuard no_grad;
  switch (request.op) {  // as if every rank held what this one holds
    case Op::kAllGather:
      request.out.view({group().size(), -1})
          .copy_(request.in.reshape({1, -1}).expand({group().size(), -1}));
      break;
    case Op::kReduceScatter:
      request.out.view(-1).copy_(request.in.view({group().size(), -1})[group().rank]);
      break;
    case Op::kAllToAll:
      request.out.view(-1).copy_(request.in.view(-1));
      break;
    case Op::kAllToAllV:
    case Op::kRecv:
      request.out.zero_();
      break;
    default:
      break;
  }
  state().recorder.end(id, true);
  return nullptr;
}

std::shared_ptr<Backend> FakeBackend::split(const std::string& /*axis*/,
                                            const std::vector<int>& members) {
  return std::make_shared<FakeBackend>(subgroup_of(group(), members), shared_state());
}

void FakeBackend::abort(const std::string& reason) noexcept {
  if (!aborted_.exchange(true)) log::error("comm", "the job is aborted: {}", reason);
}

Communicator make_fake_communicator(int rank, int size) {
  CAPSTAN_CHECK(size >= 1 && rank >= 0 && rank < size, "a fake world has no rank {} of {}", rank,
                size);
  Group group{.ranks = {}, .rank = rank};
  for (int r = 0; r < size; ++r) group.ranks.push_back(r);
  constexpr double kNeverWaits = 600;
  return {std::make_shared<FakeBackend>(std::move(group),
                                        std::make_shared<RankState>(rank, kNeverWaits)),
          "world"};
}

}  // namespace capstan::comm
