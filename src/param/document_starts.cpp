// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/param/context.h"

namespace capstan::param {
namespace {

[[noreturn]] void refuse(int64_t row, int64_t token, int32_t first, int64_t start) {
  throw DataError(ErrorText{
      .module = "param",
      .what = fmt::format("finding the documents of row {}", row),
      .got = fmt::format("token {} that sees from token {} on", token, first),
      .need = fmt::format("{}, where its document starts, or {}, to start one", start, token),
      .why = "tokens of a document see from its first token on",
      .fix = "Give each token the start of its document as first key"});
}

}  // namespace

DocumentStarts document_starts(const Tensor& first_key) {
  CAPSTAN_CHECK(first_key.dim() == 2 && first_key.is_cpu() && first_key.scalar_type() == at::kInt &&
                    first_key.numel() > 0,
                "documents: first keys must be int32 [samples, tokens] on the CPU");
  const Tensor keys_BT = first_key.contiguous();
  const auto* const key = keys_BT.const_data_ptr<int32_t>();
  const int64_t rows = keys_BT.size(0), tokens = keys_BT.size(1);
  std::vector<int32_t> starts;
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t t = 0, start = 0; t < tokens; ++t) {
      const int32_t first = key[b * tokens + t];
      if (first == t) {
        start = t;
        starts.push_back(static_cast<int32_t>(b * tokens + t));
      } else if (first != start || t == 0) {
        refuse(b, t, first, start);
      }
    }
  int64_t longest = 0;
  const auto end = static_cast<int32_t>(rows * tokens);
  for (size_t i = 0; i < starts.size(); ++i)
    longest = std::max<int64_t>(longest, (i + 1 < starts.size() ? starts[i + 1] : end) - starts[i]);
  starts.resize(std::bit_ceil(starts.size()) + 1, end);
  return {at::tensor(starts, at::kInt), longest, {}};
}

Tensor chunk_starts(const Tensor& starts, int64_t row_length, int64_t chunks) {
  CAPSTAN_CHECK(starts.dim() == 1 && starts.is_cpu() && starts.scalar_type() == at::kInt &&
                    chunks > 0 && row_length % chunks == 0,
                "documents: starts must be int32 on the CPU, and {} tokens fall into {} chunks",
                row_length, chunks);
  const int64_t length = row_length / chunks;
  const Tensor row_E = starts.div(row_length, "floor"), place_E = starts.remainder(row_length);
  const Tensor begin_C1 = at::arange(0, row_length, length, at::kInt).unsqueeze(1);
  return (place_E - begin_C1).clamp(0, length).add_(row_E * length).contiguous();
}

}  // namespace capstan::param
