// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/flat_store.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/param/init.h"

namespace capstan::parallel {
namespace {

std::vector<ShardRange> ranges_of(const plan::FlatBuffer& layout,
                                  const std::vector<plan::ParamSpec>& table, bool counts_in_norm) {
  std::vector<ShardRange> ranges;
  for (const auto& piece : plan::pieces_of(layout, table, 0, layout.numel)) {
    const auto& local = layout.params[static_cast<size_t>(piece.param)];
    const auto& spec = table[static_cast<size_t>(local.spec)];
    const ShardRange range{piece.offset, piece.offset + piece.box.numel(), spec.decay,
                           counts_in_norm && local.counted};
    const bool joins = !ranges.empty() && ranges.back().end == range.begin &&
                       ranges.back().decay == range.decay && ranges.back().counted == range.counted;
    if (joins)
      ranges.back().end = range.end;
    else
      ranges.push_back(range);
  }
  return ranges;
}

}  // namespace

at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFp64:
      return at::kDouble;
    case DType::kFp32:
      return at::kFloat;
    case DType::kBf16:
      return at::kBFloat16;
    case DType::kFp16:
      return at::kHalf;
    default:
      break;
  }
  CAPSTAN_CHECK(false, "{} is no type for weights", name_of(dtype));
  return at::kFloat;
}

StorageTypes storage_types(const plan::PrecisionPlan& precision) {
  return {scalar_type_of(precision.compute), scalar_type_of(precision.master),
          scalar_type_of(precision.gradients)};
}

FlatStore::FlatStore(plan::FlatBuffer layout, const std::vector<plan::ParamSpec>& table,
                     const StorageTypes& types, Tensor gradient, bool counts_in_norm)
    : layout_(std::move(layout)),
      table_(table),
      counts_in_norm_(counts_in_norm),
      gradient_(std::move(gradient)),
      is_written_(layout_.params.size(), false) {
  CAPSTAN_CHECK(layout_.shards == 1, "block {} in {} shards", layout_.block, layout_.shards);
  CAPSTAN_CHECK(gradient_.defined() == layout_.trainable, "block {}: gradients {}, trainable {}",
                layout_.block, gradient_.defined(), layout_.trainable);
  CAPSTAN_CHECK(
      !gradient_.defined() ||
          (gradient_.numel() == layout_.numel && gradient_.scalar_type() == types.gradients),
      "block {}: {} gradient elements for {}", layout_.block, gradient_.numel(), layout_.numel);
  master_ = at::zeros({layout_.numel}, types.master);
  compute_ = types.compute == types.master ? master_ : at::zeros({layout_.numel}, types.compute);
  anchor_ = at::empty({0}, at::kFloat).requires_grad_(layout_.trainable);
  values_.reserve(layout_.params.size());
  for (size_t i = 0; i < layout_.params.size(); ++i)
    values_.push_back(view(compute_, static_cast<int>(i)));
}

std::optional<int> FlatStore::find(const std::string& name) const {
  for (int i = 0; i < static_cast<int>(layout_.params.size()); ++i)
    if (spec(i).name == name) return i;
  return std::nullopt;
}

void FlatStore::initialize(uint64_t seed, const std::string& model) {
  for (const auto& piece : plan::pieces_of(layout_, table_, 0, layout_.numel)) {
    const Tensor values =
        param::init_values(spec(piece.param), piece.box, seed, model, master_.scalar_type());
    master_.narrow(0, piece.offset, values.numel()).copy_(values.view(-1));
  }
  refresh();
}

void FlatStore::close() {
  CAPSTAN_CHECK(open_ > 0, "block {} closed more often than opened", layout_.block);
  --open_;
}

void FlatStore::begin_step() {
  std::fill(is_written_.begin(), is_written_.end(), false);
  finished_ = !layout_.trainable;
}

void FlatStore::finish_gradient() {
  CAPSTAN_CHECK(!finished_, "gradients of block {} finished twice", layout_.block);
  for (size_t i = 0; i < is_written_.size(); ++i)
    if (!is_written_[i]) view(gradient_, static_cast<int>(i)).zero_();
  finished_ = true;
}

Shard FlatStore::shard() const {
  return {.master = master_,
          .copy = compute_.is_same(master_) ? Tensor() : compute_,
          .gradient = gradient_,
          .begin = 0,
          .ranges = ranges_of(layout_, table_, counts_in_norm_),
          .update = layout_.update};
}

void FlatStore::refresh() {
  if (!compute_.is_same(master_)) compute_.copy_(master_);
  publish();
}

const plan::ParamSpec& FlatStore::spec(int index) const {
  return table_[static_cast<size_t>(local(index).spec)];
}

const plan::LocalParam& FlatStore::local(int index) const {
  return layout_.params.at(static_cast<size_t>(index));
}

Tensor FlatStore::value(int index) const {
  CAPSTAN_CHECK(open_ > 0, "{} read while its block is closed", spec(index).name);
  return values_.at(static_cast<size_t>(index));
}

Tensor FlatStore::view(const Tensor& flat, int index) const {
  const auto& param = local(index);
  return flat.narrow(0, param.flat_begin, param.numel()).view(param.local_shape);
}

bool FlatStore::is_side_by_side(std::span<const int> indices) const {
  for (size_t i = 1; i < indices.size(); ++i) {
    const auto &before = local(indices[i - 1]), &here = local(indices[i]);
    if (before.flat_begin + before.numel() != here.flat_begin) return false;
  }
  return true;
}

// Rows joined along dim 0.
Tensor FlatStore::joined_view(const Tensor& flat, std::span<const int> indices) const {
  const auto& first = local(indices.front());
  plan::Shape shape = first.local_shape;
  shape[0] = 0;
  for (const int i : indices) {
    const auto& part = local(i).local_shape;
    CAPSTAN_CHECK(std::equal(part.begin() + 1, part.end(), shape.begin() + 1, shape.end()),
                  "{} and {} differ in their trailing dimensions", spec(indices.front()).name,
                  spec(i).name);
    shape[0] += part[0];
  }
  return flat.narrow(0, first.flat_begin, plan::numel(shape)).view(shape);
}

Tensor FlatStore::joined_value(std::span<const int> indices) const {
  CAPSTAN_CHECK(!indices.empty(), "no parameters to join");
  if (indices.size() == 1) return value(indices.front());
  if (is_side_by_side(indices)) {
    CAPSTAN_CHECK(open_ > 0, "{} read while its block is closed", spec(indices.front()).name);
    return joined_view(compute_, indices);
  }
  std::vector<Tensor> parts;
  for (const int i : indices) parts.push_back(value(i));
  return at::cat(parts, 0);
}

void FlatStore::check_open_for_gradients(int index) const {
  CAPSTAN_CHECK(layout_.trainable, "{} is frozen and takes no gradient", spec(index).name);
  CAPSTAN_CHECK(!finished_, "gradient of {} added after its bucket was reduced", spec(index).name);
}

void FlatStore::accumulate(int index, const param::AddGradient& add, param::When) {
  check_open_for_gradients(index);
  param::GradSlot slot{view(gradient_, index), !is_written_[static_cast<size_t>(index)]};
  add(slot);
  is_written_[static_cast<size_t>(index)] = true;
}

// Parts of a joined write share one overwrite flag: where they differ, the unwritten become zero.
void FlatStore::settle_overwrite(std::span<const int> indices) {
  const auto written = [&](int i) { return bool(is_written_[static_cast<size_t>(i)]); };
  if (std::none_of(indices.begin(), indices.end(), written)) return;
  for (const int i : indices) {
    if (!written(i)) view(gradient_, i).zero_();
    is_written_[static_cast<size_t>(i)] = true;
  }
}

void FlatStore::accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                                  param::When when) {
  CAPSTAN_CHECK(!indices.empty(), "no parameters to join");
  for (const int i : indices) check_open_for_gradients(i);
  if (is_side_by_side(indices)) {
    settle_overwrite(indices);
    param::GradSlot slot{joined_view(gradient_, indices),
                         !is_written_[static_cast<size_t>(indices.front())]};
    add(slot);
    for (const int i : indices) is_written_[static_cast<size_t>(i)] = true;
    return;
  }
  std::vector<Tensor> parts;
  for (const int i : indices) parts.push_back(view(gradient_, i));
  param::GradSlot joined{at::zeros_like(at::cat(parts, 0)), true};
  add(joined);
  int64_t row = 0;
  for (const int i : indices) {
    const int64_t rows = local(i).local_shape[0];
    const Tensor part = joined.buffer.narrow(0, row, rows);
    accumulate(
        i, [&](param::GradSlot& slot) { param::add_to_slot(slot, part); }, when);
    row += rows;
  }
}

}  // namespace capstan::parallel
