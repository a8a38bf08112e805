// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rows to the ranks of their experts and back. Legend: R rows of this rank in expert order, Q rows
// of the experts held here, p ranks, E experts, e experts per rank, D features.
#include "parallel/expert_exchange_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <memory>
#include <numeric>

#include "capstan/base/check.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/record.h"

namespace capstan::parallel {

using at::Tensor;
namespace {

// How rows travel. They arrive by rank and are put into the order of the experts, within an expert
// by rank, so that each expert multiplies one run of rows.
struct Route {
  comm::Communicator group;
  std::vector<int64_t> sent, received;  // rows to and from each rank
  Tensor arrival_Q;  // place among the arrivals of each row in expert order; on the rows' device

  [[nodiscard]] Tensor out(const Tensor& x_RD) const {
    const Tensor arrived_QD = at::empty({arrival_Q.numel(), x_RD.size(1)}, x_RD.options());
    group.all_to_all_v(arrived_QD, x_RD.contiguous(), received, sent).wait();
    return arrived_QD.index_select(0, arrival_Q);
  }
  [[nodiscard]] Tensor back(const Tensor& y_QD) const {
    const Tensor leaving_QD = at::empty(y_QD.sizes(), y_QD.options());
    leaving_QD.index_copy_(0, arrival_Q, y_QD);
    const int64_t rows = std::accumulate(sent.begin(), sent.end(), int64_t{0});
    Tensor x_RD = at::empty({rows, y_QD.size(1)}, y_QD.options());
    group.all_to_all_v(x_RD, leaving_QD, sent, received).wait();
    return x_RD;
  }
};

// Every expert has room for as many rows of every rank, most of them padding.
struct FixedRoute {
  comm::Communicator group;
  int64_t held, room;  // experts on a rank, rows of each from a rank

  [[nodiscard]] Tensor exchange(const Tensor& leaving) const {
    Tensor arrived = at::empty_like(leaving);
    group.all_to_all(arrived, leaving).wait();
    return arrived;
  }
  [[nodiscard]] Tensor out(const Tensor& x_RD) const {
    const Tensor by_rank = x_RD.contiguous().view({group.size(), held, room, x_RD.size(1)});
    return exchange(by_rank).transpose(0, 1).reshape({-1, x_RD.size(1)});
  }
  [[nodiscard]] Tensor back(const Tensor& y_QD) const {
    const Tensor by_expert = y_QD.view({held, group.size(), room, y_QD.size(1)});
    return exchange(by_expert.transpose(0, 1).contiguous()).view({-1, y_QD.size(1)});
  }
};

template <class AnyRoute>
Tensor travel(const std::shared_ptr<AnyRoute>& route, const Tensor& x, bool is_out) {
  Tensor y;
  {
    at::NoGradGuard no_grad;
    const Tensor rows = x.detach();
    y = is_out ? route->out(rows) : route->back(rows);
  }
  return ops::record(
      y, {is_out ? "to_experts" : "from_experts",
          {x},
          {},
          {},
          [route, is_out](const ops::Tensors&, ops::Tensors& grads) -> ops::Tensors {
            at::NoGradGuard no_grad;
            return {is_out ? route->back(grads[0].detach()) : route->out(grads[0].detach())};
          }});
}

std::vector<int64_t> row_sums(const Tensor& counts_pe) {
  const Tensor sums_p = counts_pe.sum(1).contiguous();
  const auto* const begin = sums_p.const_data_ptr<int64_t>();
  return {begin, begin + sums_p.numel()};
}

Tensor arrivals_by_expert(const Tensor& arriving_pe) {
  const int64_t ranks = arriving_pe.size(0), experts = arriving_pe.size(1);
  const auto* const counts = arriving_pe.const_data_ptr<int64_t>();
  const auto cells = static_cast<size_t>(ranks * experts);
  std::vector<int64_t> first(cells + 1, 0);  // among the arrivals
  std::partial_sum(counts, counts + cells, first.begin() + 1);
  // From pinned memory the copy to the device is queued and the host goes on.
  device::Accelerator* const accelerator = device::accelerator();
  const Tensor arrival_Q = accelerator ? accelerator->empty_pinned({first.back()}, at::kLong)
                                       : at::empty({first.back()}, at::kLong);
  auto* next = arrival_Q.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t r = 0; r < ranks; ++r) {
      const auto cell = static_cast<size_t>(r * experts + e);
      std::iota(next, next + counts[cell], first[cell]);
      next += counts[cell];
    }
  return arrival_Q.to(device::run_device(), /*dtype=*/at::kLong, /*non_blocking=*/true);
}

}  // namespace

nn::ExpertCut::Exchange exchange_over(const comm::Communicator& group,
                                      const std::vector<int64_t>& counts_E) {
  const int64_t ranks = group.size(), experts = static_cast<int64_t>(counts_E.size());
  CAPSTAN_CHECK(experts % ranks == 0, "{} experts over {} ranks", experts, ranks);
  at::NoGradGuard no_grad;
  const Tensor leaving_pe = at::tensor(counts_E, at::kLong).view({ranks, experts / ranks});
  const Tensor arriving_pe = at::empty_like(leaving_pe);
  group.control().all_to_all(arriving_pe, leaving_pe).wait();
  auto route = std::make_shared<Route>(
      Route{group, row_sums(leaving_pe), row_sums(arriving_pe), arrivals_by_expert(arriving_pe)});
  return {.counts = row_sums(arriving_pe.t()),
          .out = [route](const Tensor& x_RD) { return travel(route, x_RD, true); },
          .back = [route](const Tensor& y_QD) { return travel(route, y_QD, false); }};
}

nn::ExpertCut::Exchange exchange_room_over(const comm::Communicator& group, int64_t experts,
                                           int64_t room) {
  const int64_t ranks = group.size();
  CAPSTAN_CHECK(experts % ranks == 0, "{} experts over {} ranks", experts, ranks);
  const auto route = std::make_shared<const FixedRoute>(FixedRoute{group, experts / ranks, room});
  return {.counts = std::vector<int64_t>(static_cast<size_t>(experts / ranks), ranks * room),
          .out = [route](const Tensor& x_RD) { return travel(route, x_RD, true); },
          .back = [route](const Tensor& y_QD) { return travel(route, y_QD, false); }};
}

}  // namespace capstan::parallel
