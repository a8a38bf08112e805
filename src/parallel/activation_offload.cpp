// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/activation_offload.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <utility>

namespace capstan::parallel {
namespace {

struct OnHost final : ops::Kept {
  std::shared_ptr<const HostCopy> copy;
  explicit OnHost(std::shared_ptr<const HostCopy> made) : copy(std::move(made)) {}
  Tensor get() override { return copy->get(); }
};

Tensor host_copy_of(const Tensor& tensor) {
  const at::NoGradGuard no_grad;
  const bool is_remote = !tensor.device().is_cpu();
  const auto options = tensor.options().device(at::kCPU).requires_grad(false);
  const Tensor host = at::empty_like(tensor, options.pinned_memory(is_remote));
  return host.copy_(tensor.detach());
}

}  // namespace

HostCopy::HostCopy(const Tensor& tensor) : host_(host_copy_of(tensor)), device_(tensor.device()) {}

Tensor HostCopy::get() const { return device_.is_cpu() ? host_ : host_.to(device_); }

// Another tensor may have got the address of one that is gone; its storage is another.
bool ActivationOffload::Known::is(const Tensor& tensor) const {
  const auto alive = storage.lock();
  return alive && alive.get() == tensor.storage().unsafeGetStorageImpl() && !copy.expired() &&
         offset == tensor.storage_offset() && dtype == tensor.scalar_type() &&
         tensor.sizes() == at::IntArrayRef(sizes) && tensor.strides() == at::IntArrayRef(strides);
}

std::shared_ptr<const HostCopy> ActivationOffload::copy(const Tensor& tensor) {
  const auto known = std::find_if(known_.begin(), known_.end(),
                                  [&](const Known& entry) { return entry.is(tensor); });
  if (known != known_.end()) return known->copy.lock();
  auto made = std::make_shared<const HostCopy>(tensor);
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

}  // namespace capstan::parallel
