// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/meeting_internal.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstring>
#include <numeric>

#include "capstan/base/trace.h"
#include "comm/ordered_reduce_internal.h"

namespace capstan::comm {
namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 18;

std::byte* bytes_of(const Tensor& tensor) { return static_cast<std::byte*>(tensor.data_ptr()); }

int64_t row_bytes(const Tensor& tensor) {
  return tensor.size(0) == 0 ? 0 : static_cast<int64_t>(tensor.nbytes()) / tensor.size(0);
}

// What two ranks must agree on. A send and its recv are one operation seen from two sides.
std::string signature(const Request& request) {
  if (!request.is_point_to_point()) return describe(request);
  Request message = request;
  message.op = Op::kSend;
  return describe(message).substr(std::strlen("send "));
}

}  // namespace

Meeting::Meeting(std::vector<int> world_ranks)
    : world_ranks_(std::move(world_ranks)),
      requests_(world_ranks_.size()),
      came_(world_ranks_.size()) {}

Meeting::Arrival Meeting::arrive(int member, Request request, const std::string& title) {
  std::lock_guard lock(mutex);
  if (first_ < 0) {
    first_ = member;
    title_ = title;
  }
  if (std::string mismatch = find_mismatch(member, request); !mismatch.empty())
    return {.mismatch = std::move(mismatch)};
  requests_[static_cast<size_t>(member)] = std::move(request);
  came_[static_cast<size_t>(member)] = true;
  if (++arrived_ < static_cast<int>(requests_.size())) return {};
  plan_work();
  ready_.store(true, std::memory_order_release);
  if (pieces_.empty()) done_.store(true, std::memory_order_release);
  if (pieces_.size() != 1)
    changed.notify_all();  // one piece is done sooner than a waiting rank wakes up
  return {.is_last = true};
}

std::string Meeting::find_mismatch(int member, const Request& request) const {
  const auto say = [&](int other, const std::string& theirs, const std::string& mine) {
    return fmt::format("rank {} calls {} where rank {} calls {}",
                       world_ranks_[static_cast<size_t>(member)], mine,
                       world_ranks_[static_cast<size_t>(other)], theirs);
  };
  const auto& first = requests_[static_cast<size_t>(first_)];
  if (first && signature(*first) != signature(request))
    return say(first_, describe(*first), describe(request));
  if (request.op != Op::kAllToAllV) return {};
  for (size_t other = 0; other < requests_.size(); ++other) {
    const auto& theirs = requests_[other];
    if (!theirs) continue;
    const auto o = static_cast<int>(other);
    const auto m = static_cast<size_t>(member);
    const auto check = [&](const Request& from, const Request& to, size_t f,
                           size_t t) -> std::string {
      if (from.in_rows[t] == to.out_rows[f] && from.in.sizes().slice(1) == to.out.sizes().slice(1))
        return {};
      return fmt::format(
          "{}: rank {} sends {} rows of {} elements to rank {}, which expects {} of {}",
          describe(request), world_ranks_[f], from.in_rows[t],
          from.in.numel() / std::max<int64_t>(1, from.in.size(0)), world_ranks_[t], to.out_rows[f],
          to.out.numel() / std::max<int64_t>(1, to.out.size(0)));
    };
    if (auto text = check(request, *theirs, m, static_cast<size_t>(o)); !text.empty()) return text;
    if (auto text = check(*theirs, request, static_cast<size_t>(o), m); !text.empty()) return text;
  }
  return {};
}

void Meeting::plan_work() {
  const Request& first = *requests_[static_cast<size_t>(first_)];
  switch (first.op) {
    case Op::kAllReduce:
      return plan_reduce(false);
    case Op::kReduceScatter:
      return plan_reduce(true);
    case Op::kAllGather:
      return plan_all_gather();
    case Op::kAllToAll:
      return plan_all_to_all();
    case Op::kAllToAllV:
      return plan_all_to_all_v();
    case Op::kBroadcast:
      for (int to = 0; to < static_cast<int>(requests_.size()); ++to)
        plan_copy(first.peer, to, 0, 0, static_cast<int64_t>(first.in.nbytes()));
      return;
    case Op::kSend:
    case Op::kRecv:
      return plan_copy(0, 1, 0, 0, static_cast<int64_t>(requests_[0]->in.nbytes()));
    case Op::kBarrier:
      return;
  }
}

// Scatter: result part r goes to member r only. Otherwise every piece goes to all members.
void Meeting::plan_reduce(bool scatter) {
  const auto n = static_cast<int64_t>(requests_.size());
  const Tensor& in = requests_[0]->in;
  const auto item = static_cast<int64_t>(in.element_size());
  const int64_t parts = scatter ? n : 1, part = in.numel() / parts;
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / item);
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t begin = 0; begin < part; begin += piece)
      pieces_.emplace_back([this, n, item, scatter, p, begin, offset = (p * part + begin) * item,
                            count = std::min(piece, part - begin)] {
        std::vector<const std::byte*> sources;
        for (const auto& request : requests_) sources.push_back(bytes_of(request->in) + offset);
        const Request& target = *requests_[static_cast<size_t>(scatter ? p : 0)];
        std::byte* out = bytes_of(target.out) + (scatter ? begin * item : offset);
        reduce_in_rank_order(target.in.scalar_type(), target.reduce, sources, out, count);
        for (int64_t r = 1; r < n && !scatter; ++r)
          std::memcpy(bytes_of(requests_[static_cast<size_t>(r)]->out) + offset, out,
                      static_cast<size_t>(count * item));
      });
}

void Meeting::plan_all_gather() {
  const auto bytes = static_cast<int64_t>(requests_[0]->in.nbytes());
  const int n = static_cast<int>(requests_.size());
  for (int from = 0; from < n; ++from)
    for (int to = 0; to < n; ++to) plan_copy(from, to, 0, from * bytes, bytes);
}

void Meeting::plan_all_to_all() {
  const int n = static_cast<int>(requests_.size());
  const int64_t bytes = static_cast<int64_t>(requests_[0]->in.nbytes()) / n;
  for (int from = 0; from < n; ++from)
    for (int to = 0; to < n; ++to) plan_copy(from, to, to * bytes, from * bytes, bytes);
}

void Meeting::plan_all_to_all_v() {
  const size_t n = requests_.size();
  for (size_t from = 0; from < n; ++from)
    for (size_t to = 0; to < n; ++to) {
      const Request &source = *requests_[from], &target = *requests_[to];
      const auto rows_before = [](const std::vector<int64_t>& rows, size_t end) {
        return std::accumulate(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(end),
                               int64_t{0});
      };
      const int64_t row = row_bytes(source.in);
      plan_copy(static_cast<int>(from), static_cast<int>(to), rows_before(source.in_rows, to) * row,
                rows_before(target.out_rows, from) * row, source.in_rows[to] * row);
    }
}

void Meeting::plan_copy(int from, int to, int64_t from_byte, int64_t to_byte, int64_t bytes) {
  const std::byte* source = bytes_of(requests_[static_cast<size_t>(from)]->in) + from_byte;
  std::byte* target = bytes_of(requests_[static_cast<size_t>(to)]->out) + to_byte;
  if (source == target) return;  // in place
  for (int64_t begin = 0; begin < bytes; begin += kPieceBytes)
    pieces_.emplace_back([=, count = static_cast<size_t>(std::min(kPieceBytes, bytes - begin))] {
      std::memcpy(target + begin, source + begin, count);
    });
}

void Meeting::help() {
  std::optional<trace::Span> span;
  if (pieces_.size() > 1 && trace::is_on()) span.emplace("comm", title_);
  size_t mine = 0;
  for (size_t i = next_piece_++; i < pieces_.size(); i = next_piece_++) {
    pieces_[i]();
    ++mine;
  }
  if (mine == 0 || finished_pieces_.fetch_add(mine) + mine < pieces_.size()) return;
  finish();
}

// Lets go of the tensors, whose ranks may hold their Work for longer.
void Meeting::finish() {
  std::vector<std::optional<Request>> finished(requests_.size());
  std::lock_guard lock(mutex);
  finished.swap(requests_);
  done_.store(true, std::memory_order_release);
  changed.notify_all();
}

std::vector<int> Meeting::missing() const {
  std::lock_guard lock(mutex);
  std::vector<int> ranks;
  for (size_t i = 0; i < came_.size(); ++i)
    if (!came_[i]) ranks.push_back(world_ranks_[i]);
  return ranks;
}

void Meeting::wake() {
  std::lock_guard lock(mutex);
  changed.notify_all();
}

}  // namespace capstan::comm
