// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Zig-zag split of rows over the context axis: of 2n equal chunks rank r of n holds chunks r and
// 2n-1-r, so that causal attention gives every rank the same work. Legend: B samples, T tokens of
// the whole row.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace capstan::parallel {

using at::Tensor;

struct RowRange {
  int64_t begin = 0, end = 0;
  [[nodiscard]] int64_t size() const { return end - begin; }
  bool operator==(const RowRange&) const = default;
};

// The ranges of a row of `length` tokens that rank `rank` of `ranks` holds, in the order in which
// it holds them; one rank: the whole row. Throws InternalError when `length` is no multiple of
// 2 x ranks.
[[nodiscard]] std::vector<RowRange> context_ranges(int64_t length, int ranks, int rank);
// context_ranges as one index per local token, int64 (RowMap::row_index_T).
[[nodiscard]] Tensor context_row_index(int64_t length, int ranks, int rank);

// The part of rank `rank` of x [B, T, ...]; contiguous.
[[nodiscard]] Tensor split_sequence(const Tensor& x_BT, int ranks, int rank);
// The whole of the parts of all ranks, in rank order; contiguous.
[[nodiscard]] Tensor join_sequence(const std::vector<Tensor>& parts);

}  // namespace capstan::parallel
