// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/activation_offload.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "capstan/base/check.h"
#include "parallel/host_arena_internal.h"

namespace capstan::parallel {
namespace {

struct OnHost final : ops::Kept {
  std::shared_ptr<HostCopy> copy;
  explicit OnHost(std::shared_ptr<HostCopy> made) : copy(std::move(made)) {}
  Tensor get() override { return copy->get(); }
};

// The elements in the order of memory, 1-d; a copy where there are gaps or shared places.
Tensor flat(const Tensor& tensor) {
  const at::NoGradGuard no_grad;
  const Tensor plain = tensor.detach();
  if (plain.is_non_overlapping_and_dense()) return plain.as_strided({plain.numel()}, {1});
  return plain.contiguous().view(-1);
}

std::vector<int64_t> flat_strides(const Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return tensor.strides().vec();
  return at::empty_like(tensor, tensor.options().device(at::kMeta), at::MemoryFormat::Contiguous)
      .strides()
      .vec();
}

}  // namespace

OffloadedBlock::OffloadedBlock(const HostLink& link)
    : link_(link), there_(link.accelerator()), back_(link.accelerator()) {}

// A step that failed leaves copies queued: their device memory goes to others behind them.
OffloadedBlock::~OffloadedBlock() {
  try {
    close();
    retire();
    join();
  } catch (const std::exception&) {  // the device has failed before, which is being reported
  }
}

// The place may have been another copy's: behind a fetch that reads it still.
void OffloadedBlock::put(const std::shared_ptr<HostCopy>& copy, Tensor source) {
  CAPSTAN_CHECK(state_ == State::kOpen, "a tensor for a block that is closed");
  if (entries_.empty()) link_.order(link_.to_device(), link_.to_host());
  link_.order(link_.accelerator().current_stream(), link_.to_host());
  link_.copy(source, copy->host_, link_.to_host());
  entries_.push_back({copy, std::move(source)});
}

void OffloadedBlock::close() {
  if (state_ != State::kOpen) return;
  there_.set(link_.to_host());
  state_ = State::kLeaving;
}

void OffloadedBlock::retire() {
  if (state_ != State::kLeaving) return;
  there_.hold(link_.accelerator().current_stream());
  for (Entry& entry : entries_) entry.source = Tensor();
  state_ = State::kAway;
}

// Until they are joined, tensors are kept here as well: whoever drops them unread must not let
// their memory go to others before the copies are through.
void OffloadedBlock::fetch() {
  close();
  if (state_ == State::kLeaving) {
    back_.set(link_.to_host());
    for (Entry& entry : entries_)
      if (const auto copy = entry.copy.lock()) copy->back_ = entry.source;
    state_ = State::kBack;
  } else if (state_ == State::kAway) {
    bring_back();
    state_ = State::kBack;
  }
}

void OffloadedBlock::bring_back() {
  const device::Stream stream = link_.to_device();
  for (Entry& entry : entries_)
    if (const auto copy = entry.copy.lock()) entry.source = copy->make_room();
  // The memory may have been another tensor's until here; and copies to the host are through.
  link_.order(link_.accelerator().current_stream(), stream);
  for (const Entry& entry : entries_)
    if (const auto copy = entry.copy.lock()) link_.copy(copy->host_, entry.source, stream);
  back_.set(stream);
}

void OffloadedBlock::join() {
  if (state_ != State::kBack) return;
  back_.hold(link_.accelerator().current_stream());
  entries_.clear();
  state_ = State::kRead;
}

HostCopy::HostCopy(const Tensor& tensor, std::shared_ptr<OffloadedBlock> block)
    : sizes_(tensor.sizes().vec()),
      strides_(flat_strides(tensor)),
      device_(tensor.device()),
      block_(std::move(block)) {
  if (!block_) {
    host_ = flat(tensor).clone();
    return;
  }
  const std::shared_ptr<HostArena>& arena = block_->link_.arena();
  const auto give_back = [arena](const HostArena::Place* place) {
    arena->give_back(*place);
    delete place;
  };
  const auto bytes = static_cast<int64_t>(tensor.numel() * tensor.itemsize());
  const std::shared_ptr<const HostArena::Place> place(new HostArena::Place(arena->take(bytes)),
                                                      give_back);
  host_ = arena->memory(*place).narrow(0, 0, bytes).view(tensor.scalar_type());
  place_ = place;
}

Tensor HostCopy::make_room() {
  back_ = at::empty(host_.sizes(), host_.options().device(device_).pinned_memory(false));
  return back_;
}

Tensor HostCopy::get() {
  if (!block_) return host_.as_strided(sizes_, strides_);
  block_->fetch();
  block_->join();
  CAPSTAN_CHECK(back_.defined(), "an offloaded tensor that its block does not know");
  return back_.as_strided(sizes_, strides_);
}

// Another tensor may have got the address of one that is gone; its storage is another.
bool ActivationOffload::Known::is(const Tensor& tensor) const {
  const auto alive = storage.lock();
  return alive && alive.get() == tensor.storage().unsafeGetStorageImpl() && !copy.expired() &&
         offset == tensor.storage_offset() && dtype == tensor.scalar_type() &&
         tensor.sizes() == at::IntArrayRef(sizes) && tensor.strides() == at::IntArrayRef(strides);
}

std::shared_ptr<HostCopy> ActivationOffload::copy(const Tensor& tensor) {
  const auto known = std::find_if(known_.begin(), known_.end(),
                                  [&](const Known& entry) { return entry.is(tensor); });
  if (known != known_.end()) return known->copy.lock();
  if (link_ && !open_) open_ = std::make_shared<OffloadedBlock>(*link_);
  auto made = std::make_shared<HostCopy>(tensor, open_);
  if (open_) open_->put(made, flat(tensor));
  known_.push_back({.storage = tensor.storage().getWeakStorageImpl(),
                    .offset = tensor.storage_offset(),
                    .sizes = tensor.sizes().vec(),
                    .strides = tensor.strides().vec(),
                    .dtype = tensor.scalar_type(),
                    .copy = made});
  return made;
}

std::unique_ptr<ops::Kept> ActivationOffload::keep(const Tensor& tensor) {
  if (static_cast<int64_t>(tensor.nbytes()) < kSmallestBytes) return nullptr;
  return std::make_unique<OnHost>(copy(tensor));
}

std::shared_ptr<OffloadedBlock> ActivationOffload::end_block() {
  known_.clear();
  if (!open_) return nullptr;
  open_->close();
  retire_all_but(nullptr);
  leaving_ = {open_};
  return std::exchange(open_, nullptr);
}

void ActivationOffload::retire_all_but(const OffloadedBlock* block) {
  for (const auto& one : leaving_)
    if (one.get() != block) one->retire();
  leaving_.clear();
}

void ActivationOffload::fetch(OffloadedBlock* block) {
  if (!block) return;
  retire_all_but(block);
  block->fetch();
}

}  // namespace capstan::parallel
