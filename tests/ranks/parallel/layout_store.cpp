// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "ranks/parallel/layout_store.h"

#include <ATen/ATen.h>

#include <limits>

#include "capstan/base/check.h"
#include "capstan/base/philox.h"

namespace capstan::test {

using at::Tensor;

Tensor whole_value(const plan::ParamSpec& spec) {
  const Tensor out = at::empty(spec.shape, at::kDouble);
  philox::fill_normal(std::span<double>(out.data_ptr<double>(), static_cast<size_t>(out.numel())),
                      11, philox::stream_of("value", spec.name), 0, 0.25);
  if (spec.init.kind == plan::Init::Kind::kOnes) out.add_(1);
  return out;
}

LayoutStore::LayoutStore(const plan::Layout& layout, int rank, at::ScalarType dtype, bool deferred)
    : table_(layout.table()),
      live_anchor_(at::empty({0}).requires_grad_(true)),
      frozen_anchor_(at::empty({0})),
      deferred_(deferred),
      dtype_(dtype) {
  for (const plan::FlatBuffer& buffer : layout.rank(rank).buffers)
    for (const plan::LocalParam& local : buffer.params) {
      Tensor whole = whole_value(table_[static_cast<size_t>(local.spec)]);
      const Tensor value = at::zeros(local.local_shape, dtype);
      Tensor real = value;
      for (size_t d = 0; d < local.real.begin.size(); ++d) {
        const auto dim = static_cast<int64_t>(d);
        whole = whole.narrow(dim, local.real.begin[d], local.real.extent[d]);
        real = real.narrow(dim, 0, local.real.extent[d]);
      }
      real.copy_(whole);
      const double nan = std::numeric_limits<double>::quiet_NaN();
      locals_.push_back(local);
      trainable_.push_back(buffer.trainable);
      values_.push_back(value);
      slots_.push_back({at::full_like(value, nan), true});
    }
}

param::Param LayoutStore::find(const std::string& name) {
  for (size_t i = 0; i < locals_.size(); ++i)
    if (spec(static_cast<int>(i)).name == name) return {this, static_cast<int>(i)};
  CAPSTAN_CHECK(false, "no parameter {}", name);
}

void LayoutStore::run_deferred() {
  for (const auto& add : waiting_) add();
  waiting_.clear();
}

const plan::ParamSpec& LayoutStore::spec(int index) const {
  return table_[static_cast<size_t>(local(index).spec)];
}
const plan::LocalParam& LayoutStore::local(int index) const {
  return locals_[static_cast<size_t>(index)];
}
bool LayoutStore::trainable(int index) const { return trainable_[static_cast<size_t>(index)]; }
Tensor LayoutStore::value(int index) const { return values_[static_cast<size_t>(index)]; }
Tensor LayoutStore::anchor(int index) const {
  return trainable(index) ? live_anchor_ : frozen_anchor_;
}

Tensor LayoutStore::joined_value(std::span<const int> indices) const {
  std::vector<Tensor> parts;
  for (const int i : indices) parts.push_back(value(i));
  return at::cat(parts);
}

void LayoutStore::accumulate(int index, const param::AddGradient& add, param::When when) {
  accumulate_joined(std::span<const int>(&index, 1), add, when);
}

void LayoutStore::accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                                    param::When when) {
  std::vector<int> list(indices.begin(), indices.end());
  if (deferred_ && when == param::When::kDeferrable)
    waiting_.push_back([this, list = std::move(list), add] { run(list, add); });
  else
    run(list, add);
}

void LayoutStore::run(const std::vector<int>& indices, const param::AddGradient& add) {
  if (indices.size() == 1) return add(slots_[static_cast<size_t>(indices[0])]);
  std::vector<Tensor> parts;
  for (const int i : indices) parts.push_back(slots_[static_cast<size_t>(i)].buffer);
  param::GradSlot joined{at::full_like(at::cat(parts), std::numeric_limits<double>::quiet_NaN()),
                         true};
  add(joined);
  int64_t row = 0;
  for (const int i : indices) {
    param::GradSlot& slot = slots_[static_cast<size_t>(i)];
    param::add_to_slot(slot, joined.buffer.narrow(0, row, slot.buffer.size(0)));
    row += slot.buffer.size(0);
  }
}

}  // namespace capstan::test
