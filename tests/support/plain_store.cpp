// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/plain_store.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "capstan/base/check.h"
#include "capstan/param/init.h"

namespace capstan::testing {

using at::Tensor;

PlainStore::PlainStore(std::vector<plan::ParamSpec> table, PlainStoreOptions options)
    : table_(std::move(table)),
      options_(std::move(options)),
      locals_(table_.size()),
      values_(table_.size()),
      slots_(table_.size()),
      live_anchor_(at::empty({0}).requires_grad_(true)),
      frozen_anchor_(at::empty({0})) {
  for (size_t i = 0; i < table_.size(); ++i) make_local(i);
  std::vector<bool> done(table_.size());
  for (size_t i = 0; i < table_.size(); ++i) {
    if (done[i]) continue;
    std::vector<int> members;
    for (size_t j = i; j < table_.size(); ++j) {
      const bool together = options_.joined && table_[i].fuse_group >= 0 &&
                            table_[j].block == table_[i].block &&
                            table_[j].fuse_group == table_[i].fuse_group;
      if (j != i && !together) continue;
      members.push_back(static_cast<int>(j));
      done[j] = true;
    }
    make_group(members);
  }
  clear_gradients();
}

void PlainStore::make_local(size_t index) {
  plan::LocalParam& local = locals_[index];
  const plan::ParamSpec& spec = table_[index];
  local.spec = static_cast<int>(index);
  local.real = plan::Box{std::vector<int64_t>(spec.shape.size(), 0), spec.shape};
  if (spec.tensor.kind == plan::ShardRule::Kind::kVocab && !options_.vocab_box.begin.empty())
    local.real = options_.vocab_box;
  local.local_shape = local.real.extent;
  if (spec.tensor.kind == plan::ShardRule::Kind::kVocab)
    local.local_shape[0] += options_.vocab_padding;
}

// One tensor for all members; each member's value and gradient are rows of it.
void PlainStore::make_group(std::vector<int> members) {
  std::vector<int64_t> sizes = locals_[members[0]].local_shape;
  sizes[0] = 0;
  for (const int i : members) sizes[0] += locals_[i].local_shape[0];
  const bool is_wide = options_.wide && table_[static_cast<size_t>(members[0])].wide;
  const Tensor values = at::zeros(sizes, is_wide ? *options_.wide : options_.values);
  const Tensor gradients = at::zeros(sizes, options_.gradients);
  int64_t row = 0;
  for (const int i : members) {
    const int64_t rows = locals_[i].local_shape[0];
    values_[i] = values.narrow(0, row, rows);
    slots_[i].buffer = gradients.narrow(0, row, rows);
    const bool wide = options_.values == at::kDouble;
    values_[i]
        .narrow(0, 0, locals_[i].real.extent[0])
        .copy_(param::init_values(table_[i], locals_[i].real, options_.seed, "policy",
                                  wide ? at::kDouble : at::kFloat));
    row += rows;
  }
}

int PlainStore::index_of(const std::string& name) const {
  for (size_t i = 0; i < table_.size(); ++i)
    if (table_[i].name == name) return static_cast<int>(i);
  CAPSTAN_CHECK(false, "no parameter {}", name);
}

param::Param PlainStore::find(const std::string& name) { return {this, index_of(name)}; }
Tensor PlainStore::value_of(const std::string& name) { return values_[index_of(name)]; }
bool PlainStore::has_gradient(const std::string& name) { return !slots_[index_of(name)].overwrite; }
Tensor PlainStore::gradient_of(const std::string& name) {
  CAPSTAN_CHECK(has_gradient(name), "{} got no gradient", name);
  return slots_[index_of(name)].buffer;
}

void PlainStore::clear_gradients() {
  for (param::GradSlot& slot : slots_) {
    slot.buffer.fill_(std::numeric_limits<double>::quiet_NaN());
    slot.overwrite = true;
  }
}

void PlainStore::run_deferred() {
  for (const auto& add : waiting_) add();
  waiting_.clear();
}

bool PlainStore::trainable(int index) const {
  const auto& frozen = options_.frozen;
  return std::find(frozen.begin(), frozen.end(), table_[index].name) == frozen.end();
}

Tensor PlainStore::anchor(int index) const {
  return trainable(index) ? live_anchor_ : frozen_anchor_;
}

Tensor PlainStore::joined_value(std::span<const int> indices) const {
  std::vector<Tensor> parts;
  for (const int i : indices) parts.push_back(values_[i]);
  if (!options_.joined) return at::cat(parts);
  std::vector<int64_t> sizes = parts[0].sizes().vec();
  for (size_t i = 1; i < parts.size(); ++i) sizes[0] += parts[i].size(0);
  return parts[0].as_strided(sizes, parts[0].strides());
}

void PlainStore::add_now(const std::vector<int>& indices, const param::AddGradient& add) {
  param::GradSlot& first = slots_[indices[0]];
  if (indices.size() == 1 || options_.joined) {
    std::vector<int64_t> sizes = first.buffer.sizes().vec();
    sizes[0] = 0;
    for (const int i : indices) sizes[0] += slots_[i].buffer.size(0);
    param::GradSlot slot{first.buffer.as_strided(sizes, first.buffer.strides()), first.overwrite};
    add(slot);
    for (const int i : indices) slots_[i].overwrite = false;
    return;
  }
  std::vector<Tensor> parts;
  for (const int i : indices) parts.push_back(slots_[i].buffer);
  param::GradSlot slot{at::cat(parts), first.overwrite};
  add(slot);
  int64_t row = 0;
  for (const int i : indices) {
    slots_[i].buffer.copy_(slot.buffer.narrow(0, row, slots_[i].buffer.size(0)));
    slots_[i].overwrite = false;
    row += slots_[i].buffer.size(0);
  }
}

void PlainStore::accumulate(int index, const param::AddGradient& add, param::When when) {
  accumulate_joined(std::span<const int>(&index, 1), add, when);
}

void PlainStore::accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                                   param::When when) {
  std::vector<int> list(indices.begin(), indices.end());
  if (options_.deferred && when == param::When::kDeferrable)
    waiting_.push_back([this, list = std::move(list), add] { add_now(list, add); });
  else
    add_now(list, add);
}

}  // namespace capstan::testing
