// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Activations in host memory between forward and backward. On a device they travel on streams of
// their own while other blocks compute, and the host waits for nothing:
//   forward    a tensor goes to pinned memory as it is saved; its device memory is let go when the
//              next block's forward is queued, behind the copy
//   backward   fetch() brings a block's tensors back, one block before they are read
// On CPU ranks host memory is where tensors were already: the same path runs, copies are made at
// once, and nothing is saved.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "capstan/ops/keep.h"
#include "capstan/parallel/host_link.h"

namespace capstan::parallel {

using at::Tensor;

class HostCopy;

// What one block left on the host: goes and comes back together.
class OffloadedBlock {
 public:
  explicit OffloadedBlock(const HostLink& link);
  ~OffloadedBlock();
  OffloadedBlock(const OffloadedBlock&) = delete;
  OffloadedBlock& operator=(const OffloadedBlock&) = delete;

 private:
  friend class ActivationOffload;
  friend class HostCopy;
  enum class State { kOpen, kLeaving, kAway, kBack, kRead };
  struct Entry {
    std::weak_ptr<HostCopy> copy;
    Tensor source;  // on the device, on its way out or back
  };
  void put(const std::shared_ptr<HostCopy>& copy, Tensor source);
  void close();   // all is put
  void retire();  // the current stream waits for the copies, sources are let go
  void fetch();   // queued, or taken as it is where sources are still here
  void bring_back();
  void join();  // the current stream waits for what was fetched

  const HostLink& link_;
  State state_ = State::kOpen;
  std::vector<Entry> entries_;
  StreamMark there_, back_;
};

// A tensor in host memory. Threads may not share one.
class HostCopy {
 public:
  // block: null on the CPU.
  HostCopy(const Tensor& tensor, std::shared_ptr<OffloadedBlock> block);
  // On the device it came from; shared by all who ask. Fetches its block if nobody has.
  [[nodiscard]] Tensor get();

 private:
  friend class OffloadedBlock;
  Tensor make_room();

  std::vector<int64_t> sizes_, strides_;
  at::Device device_;
  Tensor host_, back_;  // 1-d, in the order of memory; back_: on the device, once it was fetched
  std::shared_ptr<const void> place_;  // of host_ in the arena
  std::shared_ptr<OffloadedBlock> block_;
};

// Of one rank. What several ops of a block save is copied once.
class ActivationOffload final : public ops::Keeper {
 public:
  // Smaller tensors (statistics of norms, indices of a few rows) are left where they are.
  static constexpr int64_t kSmallestBytes = 1024;

  // link: null on the CPU; must outlive this and every copy.
  explicit ActivationOffload(const HostLink* link = nullptr) : link_(link) {}

  std::unique_ptr<ops::Kept> keep(const Tensor& tensor) override;
  // For what the engine keeps itself.
  [[nodiscard]] std::shared_ptr<HostCopy> copy(const Tensor& tensor);
  // The tensors of a block are all saved: copies are no longer looked up. Null where nothing
  // travels.
  [[nodiscard]] std::shared_ptr<OffloadedBlock> end_block();
  // Starts what brings a block back. Device memory of others that are on their way out is let go
  // first. Null does nothing.
  void fetch(OffloadedBlock* block);

 private:
  struct Known {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t offset = 0;
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype = at::kFloat;
    std::weak_ptr<HostCopy> copy;
    [[nodiscard]] bool is(const Tensor& tensor) const;
  };
  void retire_all_but(const OffloadedBlock* block);

  const HostLink* link_;
  std::vector<Known> known_;
  std::shared_ptr<OffloadedBlock> open_;
  std::vector<std::shared_ptr<OffloadedBlock>> leaving_;
};

}  // namespace capstan::parallel
