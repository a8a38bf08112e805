// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/context_split.h"

#include <ATen/ATen.h>

#include "capstan/base/check.h"

namespace capstan::parallel {

std::vector<RowRange> context_ranges(int64_t length, int ranks, int rank) {
  CAPSTAN_CHECK(ranks >= 1 && rank >= 0 && rank < ranks, "rank {} of {} on the context axis", rank,
                ranks);
  if (ranks == 1) return {{0, length}};
  CAPSTAN_CHECK(length >= 0 && length % (2 * ranks) == 0,
                "a row of {} tokens does not divide into {} chunks for {} context ranks", length,
                2 * ranks, ranks);
  const int64_t chunk = length / (2 * ranks), late = 2 * ranks - 1 - rank;
  return {{rank * chunk, (rank + 1) * chunk}, {late * chunk, (late + 1) * chunk}};
}

Tensor context_row_index(int64_t length, int ranks, int rank) {
  std::vector<Tensor> parts;
  for (const RowRange& range : context_ranges(length, ranks, rank))
    parts.push_back(at::arange(range.begin, range.end, at::kLong));
  return at::cat(parts);
}

Tensor split_sequence(const Tensor& x, int ranks, int rank) {
  CAPSTAN_CHECK(x.dim() >= 2, "split_sequence: need [B, T, ...], got {} dimensions", x.dim());
  std::vector<Tensor> parts;
  for (const RowRange& range : context_ranges(x.size(1), ranks, rank))
    parts.push_back(x.narrow(1, range.begin, range.size()));
  return parts.size() == 1 ? parts[0].contiguous() : at::cat(parts, 1);
}

Tensor join_sequence(const std::vector<Tensor>& parts) {
  CAPSTAN_CHECK(!parts.empty(), "join_sequence: no parts");
  if (parts.size() == 1) return parts[0].contiguous();
  for (const Tensor& part : parts)
    CAPSTAN_CHECK(part.sizes() == parts[0].sizes() && part.size(1) % 2 == 0,
                  "join_sequence: parts need equal sizes and two equal chunks, got {} tokens",
                  part.size(1));
  const int64_t chunk = parts[0].size(1) / 2;
  std::vector<Tensor> chunks;
  for (const Tensor& part : parts) chunks.push_back(part.narrow(1, 0, chunk));
  for (size_t r = parts.size(); r-- > 0;) chunks.push_back(parts[r].narrow(1, chunk, chunk));
  return at::cat(chunks, 1);
}

}  // namespace capstan::parallel
