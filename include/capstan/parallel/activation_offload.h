// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Activations in host memory between forward and backward. On CPU ranks that is the memory they
// were in already: the same path runs and nothing is saved.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "capstan/ops/keep.h"

namespace capstan::parallel {

using at::Tensor;

// A host copy of a tensor. Threads may not share one.
class HostCopy {
 public:
  explicit HostCopy(const Tensor& tensor);
  [[nodiscard]] Tensor get() const;  // on the device it came from

 private:
  Tensor host_;
  at::Device device_;
};

// Of one rank. What several ops save is copied once.
class ActivationOffload final : public ops::Keeper {
 public:
  // Smaller tensors (statistics of norms, indices of a few rows) are left where they are.
  static constexpr int64_t kSmallestBytes = 1024;

  std::unique_ptr<ops::Kept> keep(const Tensor& tensor) override;
  // For what the engine keeps itself.
  [[nodiscard]] std::shared_ptr<const HostCopy> copy(const Tensor& tensor);
  // The tensors of a block are all saved: copies are no longer looked up.
  void end_block() { known_.clear(); }

 private:
  struct Known {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t offset = 0;
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype = at::kFloat;
    std::weak_ptr<const HostCopy> copy;
    [[nodiscard]] bool is(const Tensor& tensor) const;
  };
  std::vector<Known> known_;
};

}  // namespace capstan::parallel
