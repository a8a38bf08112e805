// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_nccl_clique.h"

#include <algorithm>
#include <cstring>

#include "comm/ordered_reduce_internal.h"

namespace capstan::test {
namespace {

using comm::NcclReduce;
using comm::NcclResult;
using comm::NcclType;

at::ScalarType torch_type_of(NcclType type) {
  switch (type) {
    case NcclType::kInt8:
      return at::kChar;
    case NcclType::kUint8:
      return at::kByte;
    case NcclType::kInt32:
      return at::kInt;
    case NcclType::kInt64:
      return at::kLong;
    case NcclType::kFloat16:
      return at::kHalf;
    case NcclType::kFloat32:
      return at::kFloat;
    case NcclType::kFloat64:
      return at::kDouble;
    case NcclType::kBfloat16:
      return at::kBFloat16;
  }
  return at::kByte;
}

comm::ReduceOp torch_op_of(NcclReduce reduce) {
  if (reduce == NcclReduce::kMax) return comm::ReduceOp::kMax;
  if (reduce == NcclReduce::kMin) return comm::ReduceOp::kMin;
  return comm::ReduceOp::kSum;
}

void copy_bytes(std::byte* to, const std::byte* from, size_t bytes) {
  if (to != from && bytes > 0) std::memcpy(to, from, bytes);
}

void sum_into(std::byte* out, const std::vector<const std::byte*>& sources,
              const NcclCollective& like) {
  comm::reduce_in_rank_order(torch_type_of(like.type), torch_op_of(like.reduce), sources, out,
                             static_cast<int64_t>(like.count));
}

}  // namespace

size_t size_of(NcclType type) { return c10::elementSize(torch_type_of(type)); }

bool NcclCollective::fits(const NcclCollective& other) const {
  return kind == other.kind && type == other.type && reduce == other.reduce && root == other.root &&
         count == other.count && is_recorded == other.is_recorded;
}

NcclClique::NcclClique(int ranks)
    : size_(ranks),
      aborted_(static_cast<size_t>(ranks)),
      running_(static_cast<size_t>(ranks)),
      next_(static_cast<size_t>(ranks)) {}

bool NcclClique::join() {
  std::unique_lock lock(mutex_);
  ++joined_;
  changed_.notify_all();
  changed_.wait(lock, [this] { return joined_ >= size_ || is_shut_; });
  return joined_ >= size_;
}

void NcclClique::shut_down() {
  std::lock_guard lock(mutex_);
  is_shut_ = true;
  changed_.notify_all();
}

NcclResult NcclClique::error() const {
  std::lock_guard lock(mutex_);
  return error_;
}

void NcclClique::run(int rank, const NcclCollective& collective) {
  const auto r = static_cast<size_t>(rank);
  std::unique_lock lock(mutex_);
  if (aborted_[r]) return;
  const int64_t number = next_[r]++;
  Meeting& meeting = meetings_[number];
  meeting.came.resize(aborted_.size());
  meeting.came[r] = collective;
  for (const auto& other : meeting.came)
    if (other && !other->fits(collective)) error_ = NcclResult::kInvalidUsage;
  // The memory of a rank that has aborted is its own again.
  const bool is_whole = std::none_of(aborted_.begin(), aborted_.end(), [](bool a) { return a; });
  if (++meeting.arrived == size_ && error_ == NcclResult::kSuccess && is_whole) {
    compute(meeting);
    meeting.is_done = true;
    changed_.notify_all();
  }
  ++running_[r];
  changed_.wait(lock, [&] { return meeting.is_done || aborted_[r]; });
  --running_[r];
  if (meeting.is_done && ++meeting.left == size_) meetings_.erase(number);
  changed_.notify_all();
}

void NcclClique::compute(const Meeting& meeting) {
  const NcclCollective& like = *meeting.came.front();
  const size_t bytes = like.count * size_of(like.type);
  const auto n = meeting.came.size();
  std::vector<const std::byte*> in;
  std::vector<std::byte*> out;
  for (const auto& came : meeting.came) {
    in.push_back(came->in);
    out.push_back(came->out);
  }
  switch (like.kind) {
    case NcclCollective::Kind::kAllReduce:
      sum_into(out[0], in, like);
      for (size_t to = 1; to < n; ++to) copy_bytes(out[to], out[0], bytes);
      return;
    case NcclCollective::Kind::kReduceScatter:
      for (size_t part = 0; part < n; ++part) {
        auto sources = in;
        for (auto& source : sources) source += part * bytes;
        sum_into(out[part], sources, like);
      }
      return;
    case NcclCollective::Kind::kAllGather:
      for (size_t to = 0; to < n; ++to)
        for (size_t from = 0; from < n; ++from) copy_bytes(out[to] + from * bytes, in[from], bytes);
      return;
    case NcclCollective::Kind::kBroadcast:
      for (size_t to = 0; to < n; ++to)
        copy_bytes(out[to], in[static_cast<size_t>(like.root)], bytes);
      return;
  }
}

void NcclClique::exchange(int rank, const std::vector<NcclMessage>& messages) {
  const auto r = static_cast<size_t>(rank);
  std::unique_lock lock(mutex_);
  if (aborted_[r]) return;
  ++running_[r];
  std::vector<std::pair<int, std::shared_ptr<Letter>>> sent;
  for (const NcclMessage& message : messages) {
    if (!message.is_send) continue;
    sent.emplace_back(message.peer, std::make_shared<Letter>(
                                        Letter{message.in, message.bytes, message.is_recorded}));
    boxes_[{rank, message.peer}].push_back(sent.back().second);
  }
  changed_.notify_all();
  bool goes_on = true;
  for (const NcclMessage& message : messages)
    goes_on = goes_on && (message.is_send || receive(lock, rank, message));
  for (const auto& [peer, letter] : sent) {
    changed_.wait(lock, [&, letter = letter] { return letter->is_taken || aborted_[r]; });
    if (!letter->is_taken) std::erase(boxes_[{rank, peer}], letter);
  }
  --running_[r];
  changed_.notify_all();
}

// Returns false when the rank is aborted.
bool NcclClique::receive(std::unique_lock<std::mutex>& lock, int rank, const NcclMessage& message) {
  const auto r = static_cast<size_t>(rank);
  Box& box = boxes_[{message.peer, rank}];
  changed_.wait(lock, [&] { return !box.empty() || aborted_[r]; });
  if (aborted_[r]) return false;
  const auto letter = box.front();
  if (letter->bytes != message.bytes || letter->is_recorded != message.is_recorded) {
    error_ = NcclResult::kInvalidUsage;
    changed_.wait(lock, [&] { return aborted_[r] == true; });
    return false;
  }
  box.pop_front();
  copy_bytes(message.out, letter->data, message.bytes);
  letter->is_taken = true;
  changed_.notify_all();
  return true;
}

void NcclClique::hang(int rank) {
  const auto r = static_cast<size_t>(rank);
  std::unique_lock lock(mutex_);
  ++running_[r];
  changed_.wait(lock, [&] { return aborted_[r] == true; });
  --running_[r];
  changed_.notify_all();
}

void NcclClique::abort(int rank) {
  const auto r = static_cast<size_t>(rank);
  std::unique_lock lock(mutex_);
  aborted_[r] = true;
  changed_.notify_all();
  changed_.wait(lock, [&] { return running_[r] == 0; });
}

}  // namespace capstan::test
