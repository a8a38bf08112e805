// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How tensors that ops save for their backward get there: as they are, by way of another memory
// (offload), or not at all, being made again when a backward asks (selective recompute). Both rest
// on record() alone; saved-tensor hooks of autograd are not involved.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

namespace capstan::ops {

using at::Tensor;

// What is left of a tensor after the forward.
class Kept {
 public:
  virtual ~Kept() = default;
  // The same numbers, without history. Called by the backward, on the thread that runs it.
  virtual Tensor get() = 0;
};

// Decides what is left of saved tensors.
class Keeper {
 public:
  virtual ~Keeper() = default;
  // Null leaves the tensor as it is. Called in the forward, without gradients.
  virtual std::unique_ptr<Kept> keep(const Tensor& tensor) = 0;
};

// Ops recorded on this thread ask the keeper while the guard lives; null asks nobody.
class KeeperGuard {
 public:
  explicit KeeperGuard(Keeper* keeper);
  ~KeeperGuard();
  KeeperGuard(const KeeperGuard&) = delete;
  KeeperGuard& operator=(const KeeperGuard&) = delete;

 private:
  Keeper* previous_;
};

// Runs forward(x, false). Nothing that its ops save is kept, nor is its result where later ops save
// it: the first of them that a backward asks for runs forward(x, true), which must make the same
// tensors in the same order and pass on no statistics. x is kept, or made again itself. Everything
// else that `forward` reads must live, unchanged, until the backward; weights as in any op. Does
// not nest. Collectives inside run once more as well, on the same ranks in the same order.
Tensor remake(const Tensor& x, std::function<Tensor(const Tensor& x, bool again)> forward);

}  // namespace capstan::ops
