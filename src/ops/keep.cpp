// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/keep.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <utility>

#include "capstan/base/check.h"
#include "ops/keep_internal.h"

namespace capstan::ops {
namespace {

thread_local Keeper* current_keeper = nullptr;
thread_local Repeat* current_repeat = nullptr;

struct Slot final : Kept {
  std::shared_ptr<Repeat> repeat;
  size_t index;
  Slot(std::shared_ptr<Repeat> from, size_t i) : repeat(std::move(from)), index(i) {}
  Tensor get() override { return repeat->take(index); }
};

struct Result final : Kept {
  std::shared_ptr<Repeat> repeat;
  explicit Result(std::shared_ptr<Repeat> from) : repeat(std::move(from)) {}
  Tensor get() override { return repeat->take_result(); }
};

// Another shape of the same elements.
struct Reshaped final : Kept {
  std::unique_ptr<Kept> base;
  std::vector<int64_t> sizes;
  Reshaped(std::unique_ptr<Kept> whole, std::vector<int64_t> shape)
      : base(std::move(whole)), sizes(std::move(shape)) {}
  Tensor get() override { return base->get().view(sizes); }
};

std::unique_ptr<Kept> remade(const Tensor& tensor) {
  if (const auto node = std::dynamic_pointer_cast<RemakingNode>(tensor.grad_fn()))
    return node->remade(tensor.output_nr());
  if (!tensor.is_view()) return nullptr;
  const Tensor base(tensor._base());
  const bool is_whole =
      tensor.is_contiguous() && base.is_contiguous() && base.numel() == tensor.numel();
  auto whole = is_whole ? remade(base) : nullptr;
  return whole ? std::make_unique<Reshaped>(std::move(whole), tensor.sizes().vec()) : nullptr;
}

std::unique_ptr<Kept> keep(const Tensor& tensor, bool is_output) {
  if (!tensor.defined()) return nullptr;
  if (current_repeat) return current_repeat->slot();
  if (auto kept = is_output ? nullptr : remade(tensor)) return kept;
  const at::NoGradGuard no_grad;
  return current_keeper ? current_keeper->keep(tensor.detach()) : nullptr;
}

}  // namespace

KeeperGuard::KeeperGuard(Keeper* keeper) : previous_(current_keeper) { current_keeper = keeper; }
KeeperGuard::~KeeperGuard() { current_keeper = previous_; }

Saved::Saved(const Tensor& tensor, bool is_output) : kept_(keep(tensor, is_output)) {
  if (!kept_) variable_ = torch::autograd::SavedVariable(tensor, is_output);
}

Tensor Saved::get(const std::shared_ptr<torch::autograd::Node>& node) const {
  return kept_ ? kept_->get() : variable_.unpack(node);
}

class Repeat::Scope {
 public:
  explicit Scope(Repeat* repeat) : previous_(std::exchange(current_repeat, repeat)) {
    CAPSTAN_CHECK(previous_ == nullptr, "selective recompute does not nest");
  }
  ~Scope() { current_repeat = previous_; }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  Repeat* previous_;
};

Repeat::Repeat(const Tensor& x, Forward forward)
    : input_(x, false),
      input_requires_grad_(x.requires_grad()),
      forward_(std::move(forward)),
      path_(path()) {}

Repeat* Repeat::running() { return current_repeat; }

Tensor Repeat::run(const Tensor& x) {
  const Scope scope(this);
  const Tensor y = forward_(x, false);
  const auto node = std::dynamic_pointer_cast<RemakingNode>(y.grad_fn());
  if (node && y.output_nr() == 0) node->repeat = shared_from_this();
  return y;
}

std::unique_ptr<Kept> Repeat::slot() {
  return std::make_unique<Slot>(shared_from_this(), slots_++);
}

std::unique_ptr<Kept> Repeat::result() {
  ++result_users_;
  return std::make_unique<Result>(shared_from_this());
}

bool Repeat::take_in(const Tensor& tensor) {
  if (is_again_ && tensor.defined()) made_.push_back(tensor.detach());
  return is_again_;
}

// With gradients on, so that the ops save what they saved; the graph is dropped at once.
void Repeat::make() {
  if (is_again_) return;
  is_again_ = true;
  const at::AutoGradMode with_graph(true);
  const PathGuard same_path(path_);
  const KeeperGuard none(nullptr);
  const Scope scope(this);
  const Tensor x = input_.get().detach().set_requires_grad(input_requires_grad_);
  Tensor result = forward_(x, true).detach();
  CAPSTAN_CHECK(made_.size() == slots_, "selective recompute: {} tensors were saved, {} made again",
                slots_, made_.size());
  if (result_users_ > 0) result_ = std::move(result);
  forward_ = {};
}

Tensor Repeat::take(size_t slot) {
  make();
  CAPSTAN_CHECK(made_.at(slot).defined(), "selective recompute: slot {} is taken already", slot);
  return std::exchange(made_[slot], Tensor());
}

Tensor Repeat::take_result() {
  make();
  return --result_users_ > 0 ? result_ : std::exchange(result_, Tensor());
}

Tensor remake(const Tensor& x, std::function<Tensor(const Tensor& x, bool again)> forward) {
  if (!at::GradMode::is_enabled()) return forward(x, false);
  return std::make_shared<Repeat>(x, std::move(forward))->run(x);
}

}  // namespace capstan::ops
