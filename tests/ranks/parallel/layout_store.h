// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// All parameters of one rank, as plan::Layout cuts them, each a tensor of its own; gradients hold
// NaN until they are first written. Values are functions of (name, place in the whole parameter).
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "capstan/param/param.h"
#include "capstan/plan/layout.h"

namespace capstan::test {

// The value of a whole parameter: normal numbers, around 1 for norms.
[[nodiscard]] at::Tensor whole_value(const plan::ParamSpec& spec);

class LayoutStore final : public param::ParamStore {
 public:
  // deferred: deferrable gradients wait for run_deferred().
  LayoutStore(const plan::Layout& layout, int rank, at::ScalarType dtype, bool deferred = false);

  [[nodiscard]] param::Param find(const std::string& name);
  [[nodiscard]] size_t size() const { return locals_.size(); }
  [[nodiscard]] bool has_gradient(size_t index) const { return !slots_[index].overwrite; }
  // Of the local shape.
  [[nodiscard]] const at::Tensor& gradient(size_t index) const { return slots_[index].buffer; }
  void run_deferred();

  [[nodiscard]] const plan::ParamSpec& spec(int index) const override;
  [[nodiscard]] const plan::LocalParam& local(int index) const override;
  [[nodiscard]] bool trainable(int index) const override;
  [[nodiscard]] at::Tensor value(int index) const override;
  [[nodiscard]] at::ScalarType compute_dtype() const override { return dtype_; }
  [[nodiscard]] uint64_t version(int) const override { return 1; }
  void accumulate(int index, const param::AddGradient& add, param::When when) override;
  [[nodiscard]] at::Tensor anchor(int index) const override;
  [[nodiscard]] at::Tensor joined_value(std::span<const int> indices) const override;
  void accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                         param::When when) override;

 private:
  void run(const std::vector<int>& indices, const param::AddGradient& add);

  std::vector<plan::ParamSpec> table_;
  std::vector<plan::LocalParam> locals_;
  std::vector<bool> trainable_;
  std::vector<at::Tensor> values_;
  std::vector<param::GradSlot> slots_;
  at::Tensor live_anchor_, frozen_anchor_;
  bool deferred_;
  at::ScalarType dtype_;
  std::vector<std::function<void()>> waiting_;
};

}  // namespace capstan::test
