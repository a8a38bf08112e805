// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The simplest ParamStore: whole parameters as tensors of their own (or one tensor per fuse group),
// gradients in buffers that hold NaN until they are first written.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "capstan/param/param.h"
#include "capstan/plan/family.h"

namespace capstan::testing {

struct PlainStoreOptions {
  at::ScalarType values = at::ScalarType::Double;
  at::ScalarType gradients = at::ScalarType::Double;
  bool joined = true;     // fuse groups share one tensor, so joined_value is a view
  bool deferred = false;  // deferrable gradients wait for run_deferred()
  uint64_t seed = 1;
  std::vector<std::string> frozen;
  std::optional<at::ScalarType> wide = {};  // type of parameters whose spec is wide
  int64_t vocab_padding = 0;                // extra rows of parameters with the vocabulary rule
  plan::Box vocab_box = {};                 // rows of the vocabulary held here; empty = all
};

class PlainStore final : public param::ParamStore {
 public:
  PlainStore(std::vector<plan::ParamSpec> table, PlainStoreOptions options);

  [[nodiscard]] param::Param find(const std::string& name);
  [[nodiscard]] at::Tensor value_of(const std::string& name);     // writable
  [[nodiscard]] at::Tensor gradient_of(const std::string& name);  // fails when nothing was written
  [[nodiscard]] bool has_gradient(const std::string& name);
  [[nodiscard]] const std::vector<plan::ParamSpec>& table() const { return table_; }
  void clear_gradients();
  void run_deferred();
  void touch() { ++version_; }  // as an optimizer step would

  [[nodiscard]] const plan::ParamSpec& spec(int index) const override { return table_[index]; }
  [[nodiscard]] const plan::LocalParam& local(int index) const override { return locals_[index]; }
  [[nodiscard]] bool trainable(int index) const override;
  [[nodiscard]] at::Tensor value(int index) const override { return values_[index]; }
  [[nodiscard]] at::ScalarType compute_dtype() const override { return options_.values; }
  [[nodiscard]] uint64_t version(int) const override { return version_; }
  void accumulate(int index, const param::AddGradient& add, param::When when) override;
  [[nodiscard]] at::Tensor anchor(int index) const override;
  [[nodiscard]] at::Tensor joined_value(std::span<const int> indices) const override;
  void accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                         param::When when) override;

 private:
  [[nodiscard]] int index_of(const std::string& name) const;
  void make_local(size_t index);
  void make_group(std::vector<int> members);
  void add_now(const std::vector<int>& indices, const param::AddGradient& add);

  std::vector<plan::ParamSpec> table_;
  PlainStoreOptions options_;
  std::vector<plan::LocalParam> locals_;
  std::vector<at::Tensor> values_;
  std::vector<param::GradSlot> slots_;
  at::Tensor live_anchor_, frozen_anchor_;
  std::vector<std::function<void()>> waiting_;
  uint64_t version_ = 0;
};

}  // namespace capstan::testing
