// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/flat_store.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/init.h"

namespace capstan::parallel {
namespace {

std::vector<ShardRange> ranges_of(const plan::FlatBuffer& layout,
                                  const std::vector<plan::ParamSpec>& table, int64_t begin,
                                  int64_t end, bool counts_in_norm) {
  std::vector<ShardRange> ranges;
  for (const auto& piece : plan::pieces_of(layout, table, begin, end)) {
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
    case DType::kUint8:
      return at::kByte;
    default:
      break;
  }
  CAPSTAN_CHECK(false, "{} is no type for weights and moments", name_of(dtype));
  return at::kFloat;
}

StorageTypes storage_types(const plan::PrecisionPlan& precision) {
  return {scalar_type_of(precision.compute), scalar_type_of(precision.master),
          scalar_type_of(precision.gradients)};
}

FlatStore::FlatStore(plan::FlatBuffer layout, const std::vector<plan::ParamSpec>& table,
                     StoreOptions options, Tensor gradient)
    : layout_(std::move(layout)),
      table_(table),
      options_(std::move(options)),
      gradient_(std::move(gradient)),
      is_written_(layout_.params.size(), false) {
  const bool whole = options_.zero_stage == 0;
  CAPSTAN_CHECK(layout_.shards == options_.shard.size(), "block {}: {} shards over {} ranks",
                layout_.block, layout_.shards, options_.shard.size());
  CAPSTAN_CHECK(gradient_.defined() ? layout_.trainable : !(layout_.trainable && whole),
                "block {}: bucket memory {}, trainable {}, ZeRO stage {}", layout_.block,
                gradient_.defined(), layout_.trainable, options_.zero_stage);
  shard_numel_ = layout_.shard_numel();
  shard_begin_ = shard_numel_ * options_.shard.rank();
  const int64_t wanted = options_.zero_stage >= 2 ? shard_numel_ : layout_.numel;
  CAPSTAN_CHECK(!gradient_.defined() || (gradient_.numel() == wanted &&
                                         gradient_.scalar_type() == options_.types.gradients),
                "block {}: {} gradient elements for {}", layout_.block, gradient_.numel(), wanted);
  anchor_ = at::empty({0}, at::kFloat).requires_grad_(layout_.trainable);
  allocate();
}

void FlatStore::allocate() {
  const StorageTypes& types = options_.types;
  const bool offloads = options_.offload_optimizer, same = value_dtype() == types.master;
  const auto here = [&](int64_t numel, at::ScalarType type) {
    return at::zeros({numel}, at::TensorOptions().device(options_.device).dtype(type));
  };
  if (options_.zero_stage < 3) {
    full_ = here(layout_.numel, value_dtype());
    copy_ = own_part(full_);
    make_views();
  } else {
    copy_ =
        options_.offload_parameters ? on_host(value_dtype()) : here(shard_numel_, value_dtype());
  }
  master_ = offloads ? on_host(types.master) : same ? copy_ : here(shard_numel_, types.master);
  if (options_.link) {
    gradient_there_ = std::make_unique<StreamMark>(options_.link->accelerator());
    values_here_ = std::make_unique<StreamMark>(options_.link->accelerator());
    if (!same && !copy_.device().is_cpu()) staged_ = on_host(value_dtype());
  }
  if (!layout_.trainable) return;
  const int64_t kept = options_.zero_stage >= 2 ? shard_numel_ : layout_.numel;
  if (!gradient_.defined()) gradient_ = here(kept, types.gradients);
  if (options_.zero_stage >= 2) gradient_shard_ = std::exchange(gradient_, Tensor());
  if (offloads) host_gradient_ = on_host(types.gradients);
}

Tensor FlatStore::on_host(at::ScalarType type) const {
  return options_.link ? options_.link->pinned(shard_numel_, type).zero_()
                       : at::zeros({shard_numel_}, type);
}

Tensor FlatStore::empty(at::ScalarType type) const {
  return at::empty({layout_.numel}, at::TensorOptions().device(options_.device).dtype(type));
}

Tensor FlatStore::own_part(const Tensor& full) const {
  return full.narrow(0, shard_begin_, shard_numel_);
}

void FlatStore::make_views() {
  values_.clear();
  values_.reserve(layout_.params.size());
  for (size_t i = 0; i < layout_.params.size(); ++i)
    values_.push_back(view(full_, static_cast<int>(i)));
}

std::optional<int> FlatStore::find(const std::string& name) const {
  for (int i = 0; i < static_cast<int>(layout_.params.size()); ++i)
    if (spec(i).name == name) return i;
  return std::nullopt;
}

void FlatStore::initialize(uint64_t seed, const std::string& model) {
  const int64_t end = shard_begin_ + shard_numel_;
  for (const auto& piece : plan::pieces_of(layout_, table_, shard_begin_, end)) {
    const int64_t count = plan::numel(piece.box.extent);
    ops::fill_init_values(master_.narrow(0, piece.offset, count), spec(piece.param), piece.box,
                          seed, model);
  }
  refresh();
}

void FlatStore::prefetch() {
  if (full_.defined()) return;
  full_ = empty(value_dtype());
  if (!options_.offload_parameters) return gather(copy_);
  // Offloaded values come to the device first.
  arriving_ = at::empty({shard_numel_}, full_.options());
  receive(copy_, arriving_);
  gather(arriving_);
}

// `to` <- `from` in host memory, behind what is queued by now; wait_for_gather() waits for it.
void FlatStore::receive(const Tensor& from, const Tensor& to) {
  if (!options_.link) return void(to.copy_(from));
  const HostLink& link = *options_.link;
  link.order(link.accelerator().current_stream(), link.to_device());
  link.copy(from, to, link.to_device());
  values_here_->set(link.to_device());
  is_arriving_ = is_read_ = true;
}

// On the stream that brings the shard, where one does; behind whoever had the memory before.
void FlatStore::gather(const Tensor& shard) {
  std::optional<device::StreamGuard> there;
  if (is_arriving_) {
    const HostLink& link = *options_.link;
    link.order(link.accelerator().current_stream(), link.to_device());
    there.emplace(link.accelerator(), link.to_device());
  }
  gather_ = options_.shard.all_gather(full_, shard);
  is_gathering_ = true;
  if (is_arriving_) values_here_->set(options_.link->to_device());
}

void FlatStore::wait_for_gather() {
  if (std::exchange(is_arriving_, false))
    values_here_->hold(options_.link->accelerator().current_stream());
  if (!std::exchange(is_gathering_, false)) return;
  gather_.wait();
  gather_ = {};
  arriving_ = Tensor();
  if (values_.empty()) make_views();
}

void FlatStore::open() {
  prefetch();
  wait_for_gather();
  ++open_;
}

void FlatStore::close() {
  CAPSTAN_CHECK(open_ > 0, "block {} closed more often than opened", layout_.block);
  if (--open_ == 0 && !keeps_full_) drop_full();
}

// Whoever still reads a view of the gathered values keeps their memory.
void FlatStore::drop_full() {
  if (options_.zero_stage < 3 || open_ > 0) return;
  wait_for_gather();  // of a prefetch that nobody used
  values_.clear();
  full_ = Tensor();
}

void FlatStore::begin_step() {
  std::fill(is_written_.begin(), is_written_.end(), false);
  finished_ = !layout_.trainable;
  has_shard_sum_ = false;
  keeps_full_ = !options_.reshard_after_forward;
}

void FlatStore::end_step() {
  keeps_full_ = false;
  drop_full();
}

void FlatStore::send_gradient() {
  if (!host_gradient_.defined()) return;
  if (!options_.link) return void(host_gradient_.copy_(gradient_shard()));
  const HostLink& link = *options_.link;
  link.order(link.accelerator().current_stream(), link.to_host());
  link.copy(gradient_shard(), host_gradient_, link.to_host());
  gradient_there_->set(link.to_host());
  is_sending_ = true;
}

void FlatStore::await_gradient() {
  if (std::exchange(is_sending_, false)) gradient_there_->synchronize();
  if (std::exchange(is_read_, false)) values_here_->synchronize();
}

Tensor FlatStore::take_gradient(bool is_last_pass) {
  CAPSTAN_CHECK(!finished_, "gradients of block {} finished twice", layout_.block);
  if (!gradient_.defined()) gradient_ = empty(options_.types.gradients);
  const bool is_transient = options_.zero_stage >= 2;
  // Padding of a fresh buffer is zeroed with everything that nobody wrote.
  int64_t clean = 0;
  const auto zero_to = [&](int64_t end) {
    if (end > clean) gradient_.narrow(0, clean, end - clean).zero_();
  };
  for (size_t i = 0; i < is_written_.size(); ++i) {
    const auto& param = layout_.params[i];
    if (!is_written_[i]) continue;
    zero_to(param.flat_begin);
    clean = param.flat_begin + param.numel();
  }
  zero_to(layout_.numel);
  std::fill(is_written_.begin(), is_written_.end(), false);
  finished_ = is_last_pass;
  return is_transient ? std::exchange(gradient_, Tensor()) : gradient_;
}

// The first sum of a step lands in the shard itself, later ones are added to it. What travelled in
// another type arrives beside it.
Tensor FlatStore::reduction_target(const Tensor& taken) {
  if (taken.scalar_type() != options_.types.gradients)
    return at::empty({shard_numel_}, taken.options());
  if (options_.zero_stage < 2) return own_part(taken);
  const bool is_first = !std::exchange(has_shard_sum_, true);
  return is_first ? gradient_shard_ : at::empty_like(gradient_shard_);
}

void FlatStore::add_to_shard(const Tensor& summed) {
  if (summed.scalar_type() != options_.types.gradients) {
    const bool adds = options_.zero_stage >= 2 && std::exchange(has_shard_sum_, true);
    adds ? gradient_shard().add_(summed) : gradient_shard().copy_(summed);
    return;
  }
  if (options_.zero_stage >= 2 && !summed.is_same(gradient_shard_)) gradient_shard_.add_(summed);
}

Tensor FlatStore::gradient_shard() const {
  if (!layout_.trainable) return {};
  return gradient_shard_.defined() ? gradient_shard_ : own_part(gradient_);
}

Shard FlatStore::shard() const {
  const Tensor values = host_values();
  return {.master = master_,
          .copy = values.is_same(master_) ? Tensor() : values,
          .gradient = host_gradient_.defined() ? host_gradient_ : gradient_shard(),
          .begin = shard_begin_,
          .ranges = ranges_of(layout_, table_, shard_begin_, shard_begin_ + shard_numel_,
                              options_.counts_in_norm),
          .update = layout_.update};
}

Shard FlatStore::numbered_shard() const {
  std::vector<int64_t> first{0};  // index in the model of each parameter's first element
  for (const auto& spec : table_) first.push_back(first.back() + plan::numel(spec.shape));
  Shard numbered = shard();
  numbered.ranges.clear();
  for (const auto& param : layout_.params) {
    const auto& spec = table_[static_cast<size_t>(param.spec)];
    const int64_t place = param.flat_begin - shard_begin_;  // of the parameter in the shard
    const int64_t begin = std::max<int64_t>(0, -place);
    const int64_t end = std::min(param.numel(), shard_numel_ - place);
    if (begin >= end) continue;
    plan::for_each_run(param, spec.shape, begin, end, [&](int64_t global, int64_t at, int64_t n) {
      numbered.ranges.push_back(
          {place + at, place + at + n, spec.decay, options_.counts_in_norm && param.counted,
           static_cast<uint64_t>(first[static_cast<size_t>(param.spec)] + global)});
    });
  }
  return numbered;
}

// What the optimizer leaves of the values, in their dtype: the copy or what is sent to it.
Tensor FlatStore::host_values() const {
  if (staged_.defined()) return staged_;
  return options_.offload_optimizer && value_dtype() == options_.types.master ? master_ : copy_;
}

void FlatStore::send_values() {
  const Tensor values = host_values();
  if (values.is_same(copy_)) return;
  copy_.device().is_cpu() ? void(copy_.copy_(values)) : receive(values, copy_);
}

void FlatStore::publish() {
  note_update();
  gather_update();
}

void FlatStore::note_update() {
  ++version_;
  if (options_.zero_stage == 3) {
    drop_full();
    CAPSTAN_CHECK(!full_.defined(), "block {} updated while it is open", layout_.block);
  } else {
    wait_for_gather();  // of an update that nobody read
  }
}

void FlatStore::gather_update() {
  if (options_.offload_optimizer) send_values();
  if (options_.zero_stage > 0 && options_.zero_stage < 3 && options_.shard.size() > 1)
    gather(copy_);
}

void FlatStore::refresh() {
  if (std::exchange(is_read_, false)) values_here_->synchronize();
  const Tensor values = host_values();
  if (!values.is_same(master_)) values.copy_(master_);
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
    return joined_view(full_, indices);
  }
  std::vector<Tensor> parts;
  for (const int i : indices) parts.push_back(value(i));
  return at::cat(parts, 0);
}

void FlatStore::check_open_for_gradients(int index) const {
  CAPSTAN_CHECK(layout_.trainable, "{} is frozen and takes no gradient", spec(index).name);
  CAPSTAN_CHECK(!finished_, "gradient of {} added after its bucket was reduced", spec(index).name);
}

void FlatStore::accumulate(int index, const param::AddGradient& add, param::When when) {
  if (is_deferred(when))
    options_.queue->target->push_back([this, index, add] { accumulate_now(index, add); });
  else
    accumulate_now(index, add);
}

void FlatStore::accumulate_now(int index, const param::AddGradient& add) {
  check_open_for_gradients(index);
  if (!gradient_.defined()) gradient_ = empty(options_.types.gradients);
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
  if (!is_deferred(when)) return accumulate_joined_now(indices, add);
  options_.queue->target->push_back([this, own = std::vector<int>(indices.begin(), indices.end()),
                                     add] { accumulate_joined_now(own, add); });
}

void FlatStore::accumulate_joined_now(std::span<const int> indices, const param::AddGradient& add) {
  CAPSTAN_CHECK(!indices.empty(), "no parameters to join");
  for (const int i : indices) check_open_for_gradients(i);
  if (!gradient_.defined()) gradient_ = empty(options_.types.gradients);
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
    accumulate_now(i, [&](param::GradSlot& slot) { param::add_to_slot(slot, part); });
    row += rows;
  }
}

}  // namespace capstan::parallel
