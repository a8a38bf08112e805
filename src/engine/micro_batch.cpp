// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <string>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/philox.h"
#include "capstan/device/accelerator.h"
#include "capstan/parallel/context_split.h"
#include "engine/micro_batch_internal.h"

namespace capstan::engine {
namespace {

std::string shape_of(const Tensor& x) {
  if (!x.defined()) return "nothing";
  return fmt::format("[{}] of {}", fmt::join(x.sizes().begin(), x.sizes().end(), ", "),
                     c10::toString(x.scalar_type()));
}

[[noreturn]] void refuse(std::string what, std::string got, std::string need) {
  throw ConfigError(ErrorText{.module = "engine",
                              .what = std::move(what),
                              .got = std::move(got),
                              .need = std::move(need),
                              .why = {},
                              .fix = {}});
}

void check_shape(const Tensor& x, const std::string& what, const std::vector<int64_t>& shape) {
  if (x.defined() && x.scalar_type() == at::kLong && x.sizes() == at::IntArrayRef(shape)) return;
  refuse("reading " + what, shape_of(x), fmt::format("[{}] of Long", fmt::join(shape, ", ")));
}

// What the host can say of the documents of a part of rows before the device has them.
void note_documents(param::RowMap& part, int ranks) {
  if (!part.first_key_BT.defined()) return;
  const int64_t half = part.first_key_BT.size(1) / 2;
  for (int64_t h = 0; h < 2; ++h)
    part.lowest_first_key[static_cast<size_t>(h)] =
        part.first_key_BT.narrow(1, h * half, half).min().item<int32_t>();
  param::DocumentStarts& documents = part.documents;
  if (documents.starts.defined())
    documents.chunks_CE = param::chunk_starts(documents.starts, part.row_length, 2 * ranks);
}

Tensor pinned(const Tensor& x) {
  return device::accelerator()->empty_pinned(x.sizes(), x.scalar_type()).copy_(x);
}

Tensor uniform_numbers_of(const MicroBatch& batch, uint64_t seed, uint64_t stream) {
  const int64_t B = batch.ids_BT.size(0), T = batch.ids_BT.size(1);
  const param::RowMap& rows = batch.rows;
  CAPSTAN_CHECK(static_cast<int64_t>(rows.samples.size()) == B,
                "drawing labels: {} sample numbers for {} rows", rows.samples.size(), B);
  const int64_t row_length = rows.row_length > 0 ? rows.row_length : T;
  Tensor made = at::empty({B, T}, at::kDouble);
  auto* number = made.data_ptr<double>();
  const auto* const place =
      rows.row_index_T.defined() ? rows.row_index_T.const_data_ptr<int64_t>() : nullptr;
  for (const int64_t sample : rows.samples)
    for (int64_t t = 0; t < T; ++t) {
      const int64_t token = sample * row_length + (place ? place[t] : t);
      *number++ = philox::uniform(seed, stream, static_cast<uint64_t>(token));
    }
  return made;
}

}  // namespace

int64_t count_targets(const Tensor& targets_BT) {
  return targets_BT.ne(kIgnoredTarget).sum().item<int64_t>();
}

int64_t count_targets(const std::vector<MicroBatch>& batches) {
  int64_t count = 0;
  for (const auto& batch : batches) count += count_targets(batch.targets_BT);
  return count;
}

void check_batch(const MicroBatch& batch) {
  if (!batch.ids_BT.defined() || batch.ids_BT.dim() != 2 || batch.ids_BT.numel() == 0)
    refuse("reading the token ids", shape_of(batch.ids_BT), "[samples, tokens] of Long");
  const auto shape = batch.ids_BT.sizes().vec();
  check_shape(batch.ids_BT, "the token ids", shape);
  check_shape(batch.targets_BT, "the targets", shape);
}

void check_batches(const std::vector<MicroBatch>& batches, const plan::BatchPlan& plan) {
  if (static_cast<int64_t>(batches.size()) != plan.micro_batches)
    refuse("starting a step", fmt::format("{} micro-batches", batches.size()),
           fmt::format("{}, as the plan says", plan.micro_batches));
  const std::vector<int64_t> shape{plan.micro_samples, plan.sequence_length};
  for (size_t i = 0; i < batches.size(); ++i) {
    check_shape(batches[i].ids_BT, fmt::format("the token ids of micro-batch {}", i), shape);
    check_shape(batches[i].targets_BT, fmt::format("the targets of micro-batch {}", i), shape);
  }
}

void check_ids(const std::vector<MicroBatch>& batches, int64_t vocab_size) {
  const auto check = [&](const Tensor& ids, const char* what, bool may_be_ignored) {
    const Tensor outside = (ids < 0).logical_or(ids >= vocab_size);
    const Tensor wrong = may_be_ignored ? outside.logical_and(ids.ne(kIgnoredTarget)) : outside;
    if (!wrong.any().item<bool>()) return;
    throw DataError(
        ErrorText{.module = "engine",
                  .what = fmt::format("reading the {} of a micro-batch", what),
                  .got = fmt::format("id {}", ids.masked_select(wrong)[0].item<int64_t>()),
                  .need = fmt::format("0 to {}", vocab_size - 1),
                  .why = "the model's vocabulary ends there",
                  .fix = "Prepare the data with the tokenizer of this model"});
  };
  for (const MicroBatch& batch : batches) {
    check(batch.ids_BT, "token ids", false);
    check(batch.targets_BT, "targets", true);
  }
}

// From pinned memory the copy is queued like a kernel and the host goes on.
Tensor to_device(const Tensor& x, at::Device device) {
  if (!x.defined() || device.is_cpu()) return x;
  return pinned(x).to(device, x.scalar_type(), /*non_blocking=*/true);
}

std::vector<Tensor> to_device(const std::vector<Tensor>& all, at::Device device) {
  std::vector<Tensor> moved;
  for (const Tensor& x : all) moved.push_back(to_device(x, device));
  return moved;
}

std::vector<Tensor> uniform_numbers(const std::vector<MicroBatch>& batches, uint64_t seed,
                                    int64_t step) {
  const uint64_t stream = philox::stream_of("curvature", std::to_string(step));
  std::vector<Tensor> all;
  for (const MicroBatch& batch : batches) all.push_back(uniform_numbers_of(batch, seed, stream));
  return all;
}

MicroBatch to_device(const MicroBatch& batch, at::Device device) {
  if (device.is_cpu()) return batch;
  const auto moved = [&](const Tensor& x) { return to_device(x, device); };
  MicroBatch on_device{moved(batch.ids_BT), moved(batch.targets_BT), batch.rows};
  on_device.rows.positions_BT = moved(batch.rows.positions_BT);
  on_device.rows.first_key_BT = moved(batch.rows.first_key_BT);
  on_device.rows.documents.starts = moved(batch.rows.documents.starts);
  on_device.rows.documents.chunks_CE = moved(batch.rows.documents.chunks_CE);
  // Read on the CPU, and by the experts on the device.
  if (batch.rows.row_index_T.defined()) on_device.rows.row_index_T = pinned(batch.rows.row_index_T);
  return on_device;
}

std::vector<MicroBatch> to_device(const std::vector<MicroBatch>& batches, at::Device device) {
  std::vector<MicroBatch> on_device;
  for (const MicroBatch& batch : batches) on_device.push_back(to_device(batch, device));
  return on_device;
}

MicroBatch find_documents(const MicroBatch& rows) {
  MicroBatch batch = rows;
  if (rows.rows.first_key_BT.defined())
    batch.rows.documents = param::document_starts(rows.rows.first_key_BT);
  return batch;
}

std::vector<MicroBatch> find_documents(const std::vector<MicroBatch>& rows) {
  std::vector<MicroBatch> batches;
  for (const MicroBatch& batch : rows) batches.push_back(find_documents(batch));
  return batches;
}

MicroBatch cut_rows(const MicroBatch& rows, int ranks, int rank) {
  if (ranks == 1) return rows;
  const int64_t B = rows.ids_BT.size(0), T = rows.ids_BT.size(1);
  if (T % (2 * ranks) != 0)
    refuse("cutting rows over the context axis", fmt::format("{} tokens", T),
           fmt::format("a multiple of 2 x parallel.context.size {}", ranks));
  const auto part = [&](const Tensor& x_BT) {
    return x_BT.defined() ? parallel::split_sequence(x_BT, ranks, rank) : x_BT;
  };
  MicroBatch batch{part(rows.ids_BT), part(rows.targets_BT), rows.rows};
  const Tensor positions_BT = rows.rows.positions_BT.defined()
                                  ? rows.rows.positions_BT
                                  : at::arange(T, at::kLong).expand({B, T}).contiguous();
  batch.rows.positions_BT = part(positions_BT);
  batch.rows.first_key_BT = part(rows.rows.first_key_BT);
  batch.rows.positions_are_rows = false;
  batch.rows.row_index_T = parallel::context_row_index(T, ranks, rank);
  batch.rows.row_length = T;
  note_documents(batch.rows, ranks);
  return batch;
}

std::vector<MicroBatch> cut_rows(const std::vector<MicroBatch>& rows, int ranks, int rank) {
  std::vector<MicroBatch> batches;
  for (const auto& row : rows) batches.push_back(cut_rows(row, ranks, rank));
  return batches;
}

}  // namespace capstan::engine
