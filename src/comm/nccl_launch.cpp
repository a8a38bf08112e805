// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What each operation is in NCCL's terms. Bytes that are only moved are sent as bytes, so every
// element type passes.
#include <ATen/ATen.h>
#include <fmt/format.h>

#include <exception>
#include <stdexcept>

#include "capstan/base/check.h"
#include "comm/nccl_channel_internal.h"

namespace capstan::comm {
namespace {

// Calls that NCCL may run at the same time.
class CallGroup {
 public:
  explicit CallGroup(const NcclTarget& target) : target_(target) {
    check_nccl(target.api, target.comm, "ncclGroupStart", target.api.group_start());
  }
  ~CallGroup() {
    if (is_open_) (void)target_.api.group_end();  // a call failed: its error is the one to report
  }
  CallGroup(const CallGroup&) = delete;
  CallGroup& operator=(const CallGroup&) = delete;
  void end() {
    is_open_ = false;
    check_nccl(target_.api, target_.comm, "ncclGroupEnd", target_.api.group_end());
  }

 private:
  const NcclTarget& target_;
  bool is_open_ = true;
};

NcclCall bytes_call(const NcclTarget& target, size_t bytes) {
  return {.comm = target.comm, .stream = target.stream, .type = NcclType::kUint8, .count = bytes};
}

void reduce(const NcclTarget& t, const Request& request) {
  const auto reduction = nccl_reduction_of(request.in.scalar_type(), request.reduce);
  CAPSTAN_CHECK(reduction.has_value(), "{} reached NCCL", describe(request));
  const NcclCall call{.comm = t.comm,
                      .stream = t.stream,
                      .type = reduction->type,
                      .count = static_cast<size_t>(request.out.numel())};
  const void* in = request.in.const_data_ptr();
  void* out = request.out.data_ptr();
  if (request.op == Op::kAllReduce)
    check_nccl(t.api, t.comm, "ncclAllReduce", t.api.all_reduce(in, out, reduction->reduce, call));
  else
    check_nccl(t.api, t.comm, "ncclReduceScatter",
               t.api.reduce_scatter(in, out, reduction->reduce, call));
}

void all_gather(const NcclTarget& t, const Request& request) {
  check_nccl(t.api, t.comm, "ncclAllGather",
             t.api.all_gather(request.in.const_data_ptr(), request.out.data_ptr(),
                              bytes_call(t, request.in.nbytes())));
}

void broadcast(const NcclTarget& t, const Request& request) {
  check_nccl(t.api, t.comm, "ncclBroadcast",
             t.api.broadcast(request.in.const_data_ptr(), request.out.data_ptr(), request.peer,
                             bytes_call(t, request.in.nbytes())));
}

// `rows` of `row_bytes` each; parts without rows are left out on both sides.
void exchange(const NcclTarget& t, const Request& request, const std::vector<int64_t>& out_rows,
              const std::vector<int64_t>& in_rows, int64_t row_bytes) {
  const auto* in = static_cast<const std::byte*>(request.in.const_data_ptr());
  auto* out = static_cast<std::byte*>(request.out.data_ptr());
  CallGroup group(t);
  for (int peer = 0; peer < t.size; ++peer) {
    const auto p = static_cast<size_t>(peer);
    const auto sent = static_cast<size_t>(in_rows[p] * row_bytes);
    const auto got = static_cast<size_t>(out_rows[p] * row_bytes);
    if (sent > 0) check_nccl(t.api, t.comm, "ncclSend", t.api.send(in, peer, bytes_call(t, sent)));
    if (got > 0) check_nccl(t.api, t.comm, "ncclRecv", t.api.recv(out, peer, bytes_call(t, got)));
    in += sent;
    out += got;
  }
  group.end();
}

void all_to_all(const NcclTarget& t, const Request& request) {
  if (request.op == Op::kAllToAllV) {
    auto row_bytes = static_cast<int64_t>(request.in.element_size());
    for (const int64_t size : request.in.sizes().slice(1)) row_bytes *= size;
    return exchange(t, request, request.out_rows, request.in_rows, row_bytes);
  }
  const std::vector<int64_t> one_each(static_cast<size_t>(t.size), 1);
  exchange(t, request, one_each, one_each, static_cast<int64_t>(request.in.nbytes()) / t.size);
}

}  // namespace

std::string nccl_error_text(NcclApi& api, NcclComm comm, const char* call, NcclResult result) {
  std::string text = fmt::format("{}: {}", call, api.error_string(result));
  if (const std::string last = api.last_error(comm); !last.empty())
    text += fmt::format(" (last error: {})", last);
  return text;
}

void check_nccl(NcclApi& api, NcclComm comm, const char* call, NcclResult result) {
  if (result != NcclResult::kSuccess)
    throw std::runtime_error(nccl_error_text(api, comm, call, result));
}

void launch_on_nccl(const NcclTarget& t, const Request& request) {
  const bool is_uneven = request.op == Op::kAllToAllV;  // some ranks may have nothing to say
  if (!is_uneven && request.payload().nbytes() == 0) return;
  switch (request.op) {
    case Op::kAllReduce:
    case Op::kReduceScatter:
      return reduce(t, request);
    case Op::kAllGather:
      return all_gather(t, request);
    case Op::kAllToAll:
    case Op::kAllToAllV:
      return all_to_all(t, request);
    case Op::kBroadcast:
      return broadcast(t, request);
    case Op::kSend:
      return check_nccl(
          t.api, t.comm, "ncclSend",
          t.api.send(request.in.const_data_ptr(), 1 - t.rank, bytes_call(t, request.in.nbytes())));
    case Op::kRecv:
      return check_nccl(
          t.api, t.comm, "ncclRecv",
          t.api.recv(request.out.data_ptr(), 1 - t.rank, bytes_call(t, request.out.nbytes())));
    case Op::kBarrier:
      return;
  }
}

}  // namespace capstan::comm
