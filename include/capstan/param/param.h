// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Param: what ops and layers see of a weight. A handle, not an autograd leaf: where the bytes live,
// when they are gathered and where the gradient goes is the business of the store behind it. Ops
// only look.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "capstan/plan/layout.h"

namespace capstan::param {

using at::Tensor;

// The gradient buffer of a parameter, in its local shape and the gradients' dtype. overwrite =
// first write since the gradients were cleared: what the buffer holds is not to be read (beta 0).
struct GradSlot {
  Tensor buffer;
  bool overwrite = false;
};
using AddGradient = std::function<void(GradSlot&)>;

// kDeferrable: a schedule may run it later (the weight half of a zero-bubble backward). kNow: the
// closure reads temporaries that do not live on.
enum class When { kDeferrable, kNow };

// One block's parameters. Implemented by parallel::FlatStore and by the plain store of the tests.
// Indices are the store's own. Not thread-safe: a store belongs to one rank.
class ParamStore {
 public:
  virtual ~ParamStore() = default;
  [[nodiscard]] virtual const plan::ParamSpec& spec(int index) const = 0;
  [[nodiscard]] virtual const plan::LocalParam& local(int index) const = 0;
  [[nodiscard]] virtual bool trainable(int index) const = 0;
  [[nodiscard]] virtual Tensor value(int index) const = 0;
  [[nodiscard]] virtual at::ScalarType compute_dtype() const = 0;
  [[nodiscard]] virtual uint64_t version(int index) const = 0;
  virtual void accumulate(int index, const AddGradient& add, When when) = 0;
  [[nodiscard]] virtual Tensor anchor(int index) const = 0;
  // Several parameters with equal trailing dims as one tensor, rows joined in the given order: a
  // view when they lie side by side (plan's fuse groups), a copy otherwise.
  [[nodiscard]] virtual Tensor joined_value(std::span<const int> indices) const = 0;
  virtual void accumulate_joined(std::span<const int> indices, const AddGradient& add,
                                 When when) = 0;
};

// Small copyable handle. Valid while its store lives.
class Param {
 public:
  Param() = default;
  Param(ParamStore* store, int index) : store_(store), index_(index) {}
  explicit operator bool() const { return store_ != nullptr; }

  [[nodiscard]] const plan::ParamSpec& spec() const { return store_->spec(index_); }
  // The part of the global tensor held here, padding included in local_shape.
  [[nodiscard]] const plan::LocalParam& local() const { return store_->local(index_); }
  [[nodiscard]] bool trainable() const { return store_->trainable(index_); }
  // Local, in compute dtype, or in the master's where the recipe keeps it wide. Its block must be
  // open. Fixed address while open; never communicates, allocates or syncs.
  [[nodiscard]] Tensor value() const { return store_->value(index_); }
  // Of activations: what an op with this parameter gives.
  [[nodiscard]] at::ScalarType compute_dtype() const { return store_->compute_dtype(); }
  // Changes with each applied step or load; keys derived copies, and backward asserts the version
  // of its forward.
  [[nodiscard]] uint64_t version() const { return store_->version(index_); }
  // Adds to the gradient through the closure; does nothing for a frozen parameter.
  void accumulate(const AddGradient& add, When when = When::kDeferrable) const {
    if (trainable()) store_->accumulate(index_, add, when);
  }
  // Empty tensor that requires grad iff trainable. Every op with a Param passes it to autograd,
  // else its backward never runs.
  [[nodiscard]] Tensor anchor() const { return store_->anchor(index_); }

  [[nodiscard]] ParamStore* store() const { return store_; }
  [[nodiscard]] int index() const { return index_; }

 private:
  ParamStore* store_ = nullptr;
  int index_ = 0;
};

// A linear layer's weights: one part, or several that share an input (q,k,v; gate,up) and are
// multiplied in one GEMM. Output features are joined in the order of the parts. Bias parts match
// weight parts, or there are none. Adapters and storage formats of later work belong here, not in
// Param.
struct Projection {
  std::vector<Param> parts;
  std::vector<Param> bias;

  [[nodiscard]] Tensor weight() const;      // [sum of rows, columns]
  [[nodiscard]] Tensor bias_value() const;  // [sum of rows], undefined without bias
  [[nodiscard]] bool trainable() const;
  [[nodiscard]] Tensor anchor() const { return parts.front().anchor(); }
  void accumulate(const AddGradient& add,
                  When when = When::kDeferrable) const;  // slot has the joined shape
  void accumulate_bias(const AddGradient& add, When when = When::kDeferrable) const;
};

// Adds `gradient` (any float dtype) into a slot, honouring overwrite; for ops that have the
// gradient as a tensor.
void add_to_slot(GradSlot& slot, const Tensor& gradient);

}  // namespace capstan::param
