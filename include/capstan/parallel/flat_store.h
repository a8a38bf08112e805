// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// FlatStore: the parameters of one flat buffer behind param::Param. Owns values in compute dtype
// and the master they are rounded from (one storage when the dtypes agree); gradients lie in a
// slice of their bucket's memory. Built without ZeRO: open and close are neutral and the shard is
// the whole buffer; stages 1 to 3 change those three and publish(), and nothing around them.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "capstan/parallel/shard.h"
#include "capstan/param/param.h"
#include "capstan/plan/layout.h"
#include "capstan/plan/plan.h"

namespace capstan::parallel {

[[nodiscard]] at::ScalarType scalar_type_of(DType dtype);  // of the float types

struct StorageTypes {
  at::ScalarType compute = at::kFloat, master = at::kFloat, gradients = at::kFloat;
};
[[nodiscard]] StorageTypes storage_types(const plan::PrecisionPlan& precision);

// Not thread-safe: belongs to one rank.
class FlatStore final : public param::ParamStore {
 public:
  // gradient: 1-d, zero, layout.numel elements of types.gradients; undefined when frozen. `table`
  // must outlive the store. counts_in_norm: of the ranks that hold this buffer, this one counts it.
  FlatStore(plan::FlatBuffer layout, const std::vector<plan::ParamSpec>& table,
            const StorageTypes& types, Tensor gradient, bool counts_in_norm);

  [[nodiscard]] const plan::FlatBuffer& layout() const { return layout_; }
  [[nodiscard]] const std::vector<plan::ParamSpec>& table() const { return table_; }
  [[nodiscard]] std::optional<int> find(const std::string& name) const;  // index for Param
  // Initial values of (seed, model, name, global index); padding stays zero.
  void initialize(uint64_t seed, const std::string& model);

  // Between open and close values may be read; calls nest.
  void open() { ++open_; }
  void close();

  // Gradients of one optimizer step: begin_step, accumulate ..., finish_gradient, shard().
  void begin_step();
  // The last pass of the step is over: parameters that nobody touched get a zero gradient; adding
  // more is an error until the next begin_step.
  void finish_gradient();
  [[nodiscard]] bool is_finished() const { return finished_; }

  [[nodiscard]] Shard shard() const;
  // After the master shard changed by the optimizer, which wrote the copy too: everybody sees it.
  void publish() { ++version_; }
  // After the master was written from outside (load): rounds the copy again and publishes.
  void refresh();

  [[nodiscard]] const plan::ParamSpec& spec(int index) const override;
  [[nodiscard]] const plan::LocalParam& local(int index) const override;
  [[nodiscard]] bool trainable(int) const override { return layout_.trainable; }
  [[nodiscard]] Tensor value(int index) const override;
  [[nodiscard]] uint64_t version(int) const override { return version_; }
  [[nodiscard]] uint64_t version() const { return version_; }
  void accumulate(int index, const param::AddGradient& add, param::When when) override;
  [[nodiscard]] Tensor anchor(int) const override { return anchor_; }
  [[nodiscard]] Tensor anchor() const { return anchor_; }
  [[nodiscard]] Tensor joined_value(std::span<const int> indices) const override;
  void accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                         param::When when) override;

 private:
  [[nodiscard]] Tensor view(const Tensor& flat, int index) const;
  [[nodiscard]] bool is_side_by_side(std::span<const int> indices) const;
  [[nodiscard]] Tensor joined_view(const Tensor& flat, std::span<const int> indices) const;
  void check_open_for_gradients(int index) const;
  void settle_overwrite(std::span<const int> indices);

  plan::FlatBuffer layout_;
  const std::vector<plan::ParamSpec>& table_;
  bool counts_in_norm_;
  Tensor master_, compute_, gradient_;  // compute_ is master_ when the dtypes agree
  Tensor anchor_;
  std::vector<Tensor> values_;    // views of compute_, one per parameter
  std::vector<bool> is_written_;  // gradient of the parameter holds numbers of this step
  bool finished_ = true;
  int open_ = 0;
  uint64_t version_ = 1;
};

}  // namespace capstan::parallel
