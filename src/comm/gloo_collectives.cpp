// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// all_reduce = all-to-all of parts, sum of the own part in rank order, all-gather of the sums: the
// traffic of a ring, and the same bits as a reduce_scatter followed by an all_gather.
#include <ATen/ATen.h>

#include <cstring>

#include "comm/gloo_backend_internal.h"
#include "comm/ordered_reduce_internal.h"

namespace capstan::comm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kSmallBytes = int64_t{1}
                                << 14;  // below, one all-gather is quicker than two rounds
constexpr int64_t kPieceBytes = int64_t{1}
                                << 24;  // bounds the memory of what arrives before it is summed

Tensor as_bytes(const Tensor& tensor) { return tensor.view(-1).view(at::kByte); }
Tensor scratch(int64_t bytes) { return at::empty({bytes}, at::kByte); }
std::byte* data_of(const Tensor& bytes) { return static_cast<std::byte*>(bytes.data_ptr()); }

// One request under way: the parameters that all steps share.
struct Run {
  GlooTransport& transport;
  const Request& request;
  const Group& group;
  Clock::time_point deadline;

  [[nodiscard]] Milliseconds left() const {
    const auto left = std::chrono::duration_cast<Milliseconds>(deadline - Clock::now());
    return std::max(left, Milliseconds(1));
  }
  [[nodiscard]] int64_t ranks() const { return group.size(); }
  [[nodiscard]] at::ScalarType type() const { return request.in.scalar_type(); }
  [[nodiscard]] int64_t item() const { return static_cast<int64_t>(request.in.element_size()); }

  // out = sum over ranks of the `bytes / ranks` bytes of each rank that lie one after the other in
  // `arrived`.
  void sum_parts(const Tensor& arrived, std::byte* out) const {
    const int64_t part = arrived.numel() / ranks();
    std::vector<const std::byte*> sources;
    for (int64_t r = 0; r < ranks(); ++r) sources.push_back(data_of(arrived) + r * part);
    reduce_in_rank_order(type(), request.reduce, sources, out, part / item());
  }
};

void all_reduce_small(const Run& run, const Tensor& inout_bytes) {
  if (inout_bytes.numel() == 0) return;
  const Tensor arrived = scratch(inout_bytes.numel() * run.ranks());
  run.transport.all_gather(arrived, inout_bytes, run.left());
  run.sum_parts(arrived, data_of(inout_bytes));
}

void all_reduce(const Run& run) {
  const Tensor bytes = as_bytes(run.request.in);
  const int64_t unit = run.ranks() * run.item();  // every part is a whole number of elements
  const int64_t body = bytes.numel() <= kSmallBytes ? 0 : bytes.numel() / unit * unit;
  const int64_t piece = std::max(unit, kPieceBytes / unit * unit);
  for (int64_t begin = 0; begin < body; begin += piece) {
    const Tensor part = bytes.narrow(0, begin, std::min(piece, body - begin));
    const Tensor arrived = scratch(part.numel()), sum = scratch(part.numel() / run.ranks());
    run.transport.all_to_all(arrived, part, {}, {}, run.left());
    run.sum_parts(arrived, data_of(sum));
    run.transport.all_gather(part, sum, run.left());
  }
  all_reduce_small(run, bytes.narrow(0, body, bytes.numel() - body));
}

void reduce_scatter(const Run& run) {
  const Tensor in = as_bytes(run.request.in), out = as_bytes(run.request.out);
  const int64_t part = out.numel(), n = run.ranks();
  if (part == 0) return;
  if (in.numel() <= 2 * kPieceBytes) {
    const Tensor arrived = scratch(in.numel());
    run.transport.all_to_all(arrived, in, {}, {}, run.left());
    return run.sum_parts(arrived, data_of(out));
  }
  const int64_t column = std::max<int64_t>(1, kPieceBytes / (n * run.item())) * run.item();
  // In place (out is this rank's part of in) a column is overwritten only after it was sent.
  for (int64_t begin = 0; begin < part; begin += column) {
    const int64_t width = std::min(column, part - begin);
    const Tensor packed = scratch(n * width), arrived = scratch(n * width);
    for (int64_t r = 0; r < n; ++r)
      std::memcpy(data_of(packed) + r * width, data_of(in) + r * part + begin,
                  static_cast<size_t>(width));
    run.transport.all_to_all(arrived, packed, {}, {}, run.left());
    run.sum_parts(arrived, data_of(out) + begin);
  }
}

void all_to_all_v(const Run& run) {
  int64_t row = run.item();
  for (const int64_t size : run.request.in.sizes().slice(1)) row *= size;
  const auto in_bytes = [row](std::vector<int64_t> rows) {
    for (int64_t& count : rows) count *= row;
    return rows;
  };
  run.transport.all_to_all(as_bytes(run.request.out), as_bytes(run.request.in),
                           in_bytes(run.request.out_rows), in_bytes(run.request.in_rows),
                           run.left());
}

}  // namespace

void run_on_transport(GlooTransport& transport, const Request& request, const Group& group,
                      std::chrono::steady_clock::time_point deadline) {
  const Run run{transport, request, group, deadline};
  switch (request.op) {
    case Op::kAllReduce:
      return all_reduce(run);
    case Op::kReduceScatter:
      return reduce_scatter(run);
    case Op::kAllGather:
      if (request.in.numel() == 0) return;
      return transport.all_gather(as_bytes(request.out), as_bytes(request.in), run.left());
    case Op::kAllToAll:
      if (request.in.numel() == 0) return;
      return transport.all_to_all(as_bytes(request.out), as_bytes(request.in), {}, {}, run.left());
    case Op::kAllToAllV:
      return all_to_all_v(run);
    case Op::kBroadcast:
      if (request.in.numel() == 0) return;
      return transport.broadcast(as_bytes(request.in), request.peer, run.left());
    case Op::kBarrier:
      return transport.barrier(run.left());
    case Op::kSend:
    case Op::kRecv:
      return;
  }
}

}  // namespace capstan::comm
