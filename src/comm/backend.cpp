// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/backend.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"

namespace capstan::comm {
namespace {

std::string type_name(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "fp64";
    case at::kFloat:
      return "fp32";
    case at::kBFloat16:
      return "bf16";
    case at::kHalf:
      return "fp16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(type);
  }
}

}  // namespace

const char* name_of(Op op) {
  switch (op) {
    case Op::kAllReduce:
      return "all_reduce";
    case Op::kAllGather:
      return "all_gather";
    case Op::kReduceScatter:
      return "reduce_scatter";
    case Op::kAllToAll:
      return "all_to_all";
    case Op::kAllToAllV:
      return "all_to_all_v";
    case Op::kBroadcast:
      return "broadcast";
    case Op::kBarrier:
      return "barrier";
    case Op::kSend:
      return "send";
    case Op::kRecv:
      return "recv";
  }
  return "unknown";
}

const char* name_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return "sum";
    case ReduceOp::kMax:
      return "max";
    case ReduceOp::kMin:
      return "min";
    case ReduceOp::kOr:
      return "or";
  }
  return "unknown";
}

const Tensor& Request::payload() const { return in.defined() ? in : out; }

int64_t Request::bytes() const {
  return payload().defined() ? static_cast<int64_t>(payload().nbytes()) : 0;
}

std::string describe(const Request& request) {
  std::string text = name_of(request.op);
  if (request.op == Op::kBarrier) return text;
  if (request.op == Op::kAllReduce || request.op == Op::kReduceScatter)
    text.append(" ").append(name_of(request.reduce));
  const Tensor& payload = request.payload();
  text.append(" ").append(type_name(payload.scalar_type()));
  if (request.op != Op::kAllToAllV) text += " x " + format_count(payload.numel());
  if (request.op == Op::kBroadcast) text += fmt::format(" from {}", request.peer);
  return text;
}

void Backend::launch(const std::string& /*what*/, const std::function<void()>& launch) { launch(); }

std::string Group::text() const {
  constexpr size_t kShown = 16;
  if (ranks.size() <= kShown) return fmt::format("[{}]", fmt::join(ranks, ","));
  return fmt::format("[{},{},..,{}: {} ranks]", ranks[0], ranks[1], ranks.back(), ranks.size());
}

Group subgroup_of(const Group& parent, const std::vector<int>& members) {
  Group group{.ranks = {}, .rank = -1};
  for (const int member : members) {
    if (member == parent.rank) group.rank = static_cast<int>(group.ranks.size());
    group.ranks.push_back(parent.ranks.at(static_cast<size_t>(member)));
  }
  CAPSTAN_CHECK(group.rank >= 0, "rank {} is not a member of the subgroup {}", parent.world_rank(),
                group.text());
  return group;
}

}  // namespace capstan::comm
