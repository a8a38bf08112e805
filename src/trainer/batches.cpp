// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/trainer/batches.h"

#include <ATen/ATen.h>

#include <cstring>

#include "capstan/base/check.h"

namespace capstan::trainer {
namespace {

at::Tensor copy_rows(const std::vector<int64_t>& values, int64_t first, int64_t count,
                     int64_t length) {
  at::Tensor rows = at::empty({count, length}, at::kLong);
  std::memcpy(rows.data_ptr<int64_t>(), values.data() + first * length,
              static_cast<size_t>(count * length) * sizeof(int64_t));
  return rows;
}

// Positions restart where a document does, so the first key a token may see lies `position` before
// it.
at::Tensor first_keys(const at::Tensor& positions_BT) {
  return (at::arange(positions_BT.size(1), at::kLong).unsqueeze(0) - positions_BT).to(at::kInt);
}

}  // namespace

engine::MicroBatch make_micro_batch(const data::SampleBatch& batch, int64_t first, int64_t count,
                                    data::Documents documents) {
  CAPSTAN_CHECK(first >= 0 && first + count <= batch.samples, "samples {}..{} of {}", first,
                first + count, batch.samples);
  engine::MicroBatch micro;
  micro.ids_BT = copy_rows(batch.tokens, first, count, batch.length);
  micro.targets_BT = copy_rows(batch.targets, first, count, batch.length);
  micro.rows.samples.assign(batch.global_sample.begin() + first,
                            batch.global_sample.begin() + first + count);
  micro.rows.positions_BT = copy_rows(batch.positions, first, count, batch.length);
  micro.rows.positions_are_rows = documents == data::Documents::kJoined;
  if (documents == data::Documents::kSeparate)
    micro.rows.first_key_BT = first_keys(micro.rows.positions_BT);
  return micro;
}

std::vector<engine::MicroBatch> split_batch(const data::SampleBatch& batch, int64_t micro_samples,
                                            data::Documents documents) {
  CAPSTAN_CHECK(batch.samples % micro_samples == 0, "{} samples in pieces of {}", batch.samples,
                micro_samples);
  std::vector<engine::MicroBatch> pieces;
  for (int64_t first = 0; first < batch.samples; first += micro_samples)
    pieces.push_back(make_micro_batch(batch, first, micro_samples, documents));
  return pieces;
}

}  // namespace capstan::trainer
