// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/request_check_internal.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstring>
#include <numeric>

#include "comm/ordered_reduce_internal.h"

namespace capstan::comm {
namespace {

[[noreturn]] void refuse(const Request& request, std::string got, std::string need) {
  throw InternalError(
      ErrorText{.module = "comm",
                .what = fmt::format("calling {} on axis {}", name_of(request.op), request.axis),
                .got = std::move(got),
                .need = std::move(need)});
}

void check_tensor(const Request& request, const Tensor& tensor, const char* name) {
  if (!tensor.defined()) refuse(request, fmt::format("an undefined tensor `{}`", name), "a tensor");
  if (!tensor.is_contiguous())
    refuse(request, fmt::format("`{}` with gaps", name), "a contiguous tensor");
}

void check_pair(const Request& request) {
  check_tensor(request, request.in, "in");
  check_tensor(request, request.out, "out");
  if (request.in.scalar_type() != request.out.scalar_type())
    refuse(request,
           fmt::format("in {}, out {}", c10::toString(request.in.scalar_type()),
                       c10::toString(request.out.scalar_type())),
           "the same type");
  if (request.in.device() != request.out.device())
    refuse(
        request,
        fmt::format("in on {}, out on {}", request.in.device().str(), request.out.device().str()),
        "one device for both");
}

void check_device(const Request& request, c10::Device device) {
  const Tensor& payload = request.payload();
  if (!payload.defined() || payload.is_cpu() || payload.device() == device) return;
  refuse(request, "a tensor on " + payload.device().str(),
         device.is_cpu() ? "one on the CPU" : fmt::format("one on {} or the CPU", device.str()));
}

void check_elements(const Request& request, int64_t got, int64_t need, const char* name) {
  if (got != need)
    refuse(request, fmt::format("{} elements in `{}`", got, name), fmt::format("{}", need));
}

void check_rows(const Request& request, const Tensor& tensor, const std::vector<int64_t>& rows,
                const Group& group, const char* name) {
  if (static_cast<int>(rows.size()) != group.size())
    refuse(request, fmt::format("{} counts for `{}`", rows.size(), name),
           fmt::format("{}, one per rank", group.size()));
  for (const int64_t count : rows)
    if (count < 0) refuse(request, fmt::format("{} rows for `{}`", count, name), "0 or more");
  const int64_t sum = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  const int64_t have = tensor.dim() == 0 ? -1 : tensor.size(0);
  if (sum != have)
    refuse(request, fmt::format("counts of {} rows in all for `{}`", sum, name),
           fmt::format("its {} rows", have));
}

void check_all_to_all(const Request& request, const Group& group) {
  check_pair(request);
  if (request.out.numel() > 0 && request.out.is_alias_of(request.in) &&
      request.out.data_ptr() == request.in.data_ptr())
    refuse(request, "the same tensor as in and out", "two tensors");
  if (request.op == Op::kAllToAllV) {
    check_rows(request, request.in, request.in_rows, group, "in");
    check_rows(request, request.out, request.out_rows, group, "out");
    if (request.in.sizes().slice(1) != request.out.sizes().slice(1))
      refuse(request, "rows of different shape in `in` and `out`", "the same shape behind dim 0");
    return;
  }
  check_elements(request, request.out.numel(), request.in.numel(), "out");
  if (request.in.numel() % group.size() != 0)
    refuse(request, fmt::format("{} elements", request.in.numel()),
           fmt::format("a multiple of {} ranks", group.size()));
}

void check_shapes(const Request& request, const Group& group) {
  switch (request.op) {
    case Op::kAllReduce:
      check_tensor(request, request.in, "inout");
      return check_reducible(request.in.scalar_type(), request.reduce);
    case Op::kAllGather:
      check_pair(request);
      return check_elements(request, request.out.numel(), request.in.numel() * group.size(), "out");
    case Op::kReduceScatter:
      check_pair(request);
      check_reducible(request.in.scalar_type(), request.reduce);
      return check_elements(request, request.in.numel(), request.out.numel() * group.size(), "in");
    case Op::kAllToAll:
    case Op::kAllToAllV:
      return check_all_to_all(request, group);
    case Op::kBroadcast:
      check_tensor(request, request.in, "inout");
      break;
    case Op::kSend:
      check_tensor(request, request.in, "in");
      break;
    case Op::kRecv:
      check_tensor(request, request.out, "out");
      break;
    case Op::kBarrier:
      return;
  }
  if (request.peer < 0 || request.peer >= group.size())
    refuse(request, fmt::format("rank {}", request.peer),
           fmt::format("a rank of the group, 0 to {}", group.size() - 1));
  if (request.is_point_to_point() && request.peer == group.rank)
    refuse(request, fmt::format("this rank itself ({})", request.peer), "another rank");
}

}  // namespace

void check_request(const Request& request, const Group& group, c10::Device device) {
  check_shapes(request, group);
  check_device(request, device);
}

void run_alone(const Request& request) {
  if (!request.in.defined() || !request.out.defined() || request.in.nbytes() == 0) return;
  if (request.in.data_ptr() == request.out.data_ptr()) return;
  if (request.in.is_cpu())
    std::memmove(request.out.data_ptr(), request.in.data_ptr(), request.in.nbytes());
  else  // in the order of the current stream
    request.out.detach().view(-1).copy_(request.in.detach().view(-1), true);
}

}  // namespace capstan::comm
