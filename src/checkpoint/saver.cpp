// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/saver.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstring>
#include <thread>

#include "capstan/base/check.h"
#include "capstan/base/env.h"
#include "capstan/base/log.h"
#include "capstan/comm/gather_text.h"

namespace capstan::checkpoint {
namespace {

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFp64;
    case at::kFloat:
      return DType::kFp32;
    case at::kBFloat16:
      return DType::kBf16;
    case at::kHalf:
      return DType::kFp16;
    case at::kLong:
      return DType::kInt64;
    case at::kInt:
      return DType::kInt32;
    case at::kByte:
      return DType::kUint8;
    default:
      break;
  }
  CAPSTAN_CHECK(false, "state of dtype {}", at::toString(tensor.scalar_type()));
}

double elapsed_ms(int64_t since_ns) {
  return static_cast<double>(monotonic_ns() - since_ns) * 1e-6;
}

}  // namespace

std::vector<StateBlob> blobs_of(const std::vector<mesh::StateEntry>& entries) {
  std::vector<StateBlob> blobs;
  blobs.reserve(entries.size());
  for (const mesh::StateEntry& e : entries) {
    CAPSTAN_CHECK(e.tensor.is_contiguous() && e.tensor.numel() == e.box.numel(),
                  "state of {} does not fill its box", e.name);
    CAPSTAN_CHECK(e.tensor.is_cpu(), "state of {} is on {}", e.name, e.tensor.device().str());
    auto* data = static_cast<std::byte*>(e.tensor.data_ptr());
    blobs.push_back({e.model,
                     e.kind,
                     e.name,
                     e.global_shape,
                     e.box,
                     dtype_of(e.tensor),
                     {data, e.tensor.nbytes()},
                     e.writes});
  }
  return blobs;
}

HostState::HostState(std::vector<mesh::StateEntry> entries)
    : entries_(std::move(entries)), on_host_(entries_) {
  for (mesh::StateEntry& entry : on_host_) entry.tensor = entry.tensor.cpu();
}

void HostState::write_back() const {
  for (size_t i = 0; i < entries_.size(); ++i)
    if (!entries_[i].tensor.is_cpu()) entries_[i].tensor.copy_(on_host_[i].tensor);
}

CommunicatorGroup::CommunicatorGroup(comm::Communicator communicator)
    : communicator_(communicator.control()) {}
int CommunicatorGroup::rank() const { return communicator_.rank(); }
int CommunicatorGroup::size() const { return communicator_.size(); }

std::vector<std::string> CommunicatorGroup::gather(const std::string& mine) {
  return comm::gather_text(communicator_, mine);
}

struct Saver::Impl {
  std::unique_ptr<CommitGroup> group;
  KeepRules rules;
  bool asynchronous = true;
  at::Tensor staging;  // kept from save to save
  std::thread thread;
  std::atomic<bool> finished{false};
  bool running = false;
  SaveOutcome outcome;
  int failures_in_row = 0;

  void stage(SaveRequest& request) {
    std::vector<StateBlob> written;
    int64_t total = 0;
    for (StateBlob& blob : request.state) {
      if (!blob.writes) continue;
      total += static_cast<int64_t>(blob.bytes.size());
      written.push_back(std::move(blob));
    }
    if (!staging.defined() || staging.numel() < total) staging = at::empty({total}, at::kByte);
    auto* at_byte = static_cast<std::byte*>(staging.data_ptr());
    for (StateBlob& blob : written) {
      std::memcpy(at_byte, blob.bytes.data(), blob.bytes.size());
      blob.bytes = {at_byte, blob.bytes.size()};
      at_byte += blob.bytes.size();
    }
    request.state = std::move(written);
  }

  void run(const SaveRequest& request) {
    const int64_t begin = monotonic_ns();
    try {
      const SaveResult result = save_step(request, *group);
      outcome.path = result.path;
      outcome.bytes = result.bytes;
      if (group->rank() == 0) tidy_up(request.directory);
    } catch (const std::exception& error) {
      outcome.error = error.what();
    }
    outcome.commit_ms = elapsed_ms(begin);
    finished = true;
  }

  // The step is committed whatever happens here.
  void tidy_up(const Path& directory) const {
    try {
      apply_retention(directory, rules);
    } catch (const std::exception& error) {
      log::warning("checkpoint", "old steps were not removed: {}", error.what());
    }
  }

  SaveOutcome collect() {
    if (thread.joinable()) thread.join();
    running = false;
    finished = false;
    failures_in_row = outcome.error.empty() ? 0 : failures_in_row + 1;
    if (failures_in_row >= 2 && group->rank() == 0)
      log::error("checkpoint", "{} saves in a row have failed; the newest good step is getting old",
                 failures_in_row);
    return std::exchange(outcome, {});
  }
};

Saver::Saver(std::unique_ptr<CommitGroup> group, KeepRules rules, bool asynchronous)
    : impl_(std::make_unique<Impl>()) {
  impl_->group = std::move(group);
  impl_->rules = rules;
  impl_->asynchronous = asynchronous;
}

Saver::~Saver() {
  if (impl_->thread.joinable()) impl_->thread.join();
}

void Saver::start(SaveRequest request) {
  CAPSTAN_CHECK(!impl_->running, "a save is in flight: collect it with wait() first");
  const int64_t begin = monotonic_ns();
  impl_->outcome = {.step = request.step};
  impl_->running = true;
  if (!impl_->asynchronous) {
    impl_->run(request);
    impl_->outcome.stall_ms = elapsed_ms(begin);
    return;
  }
  impl_->stage(request);
  impl_->outcome.stall_ms = elapsed_ms(begin);
  const int rank = log::thread_rank();
  impl_->thread = std::thread([impl = impl_.get(), rank, request = std::move(request)] {
    log::set_thread_rank(rank);
    impl->run(request);
  });
}

bool Saver::in_flight() const { return impl_->running; }

std::optional<SaveOutcome> Saver::poll() {
  if (!impl_->running || !impl_->finished) return std::nullopt;
  return impl_->collect();
}

std::optional<SaveOutcome> Saver::wait() {
  if (!impl_->running) return std::nullopt;
  return impl_->collect();
}

}  // namespace capstan::checkpoint
