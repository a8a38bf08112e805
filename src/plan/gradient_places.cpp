// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/gradient_places.h"

#include <algorithm>
#include <array>

namespace capstan::plan {

bool sums_over_ranks(const Grid& grid, const RankLayout& layout) {
  return std::any_of(layout.buffers.begin(), layout.buffers.end(), [&](const FlatBuffer& buffer) {
    return buffer.trainable && grid.size_of(buffer.sum_axes) > 1;
  });
}

SharedGradients place_gradients(const Grid& grid, const RankLayout& layout, bool tied,
                                int zero_stage) {
  SharedGradients places = share_gradients(layout, tied, zero_stage);
  if (!sums_over_ranks(grid, layout)) return places;
  const size_t count = layout.buffers.size();
  std::vector<size_t> turn(count, 0);
  std::array<int64_t, 3> size{};  // of either turn, and of the tied table's place
  int64_t table_begin = places.numel;
  size_t next = 0;
  for (const int block : layout.blocks) {
    bool learns = false;
    for (size_t i = 0; i < count; ++i) {
      const FlatBuffer& buffer = layout.buffers[i];
      if (buffer.block != block || !buffer.trainable) continue;
      const bool is_table = tied && block == 0;
      learns = learns || !is_table;
      turn[i] = is_table ? 2 : next;
      if (is_table) table_begin = std::min(table_begin, places.begin[i]);
      const int64_t kept = zero_stage >= 2 ? buffer.shard_numel() : buffer.numel;
      size[turn[i]] = std::max(size[turn[i]], places.begin[i] + kept);
    }
    if (learns) next = 1 - next;
  }
  const std::array<int64_t, 3> begin{0, size[0], size[0] + size[1] - table_begin};
  for (size_t i = 0; i < count; ++i)
    if (layout.buffers[i].trainable) places.begin[i] += begin[turn[i]];
  places.numel = size[2] > 0 ? begin[2] + size[2] : size[0] + size[1];
  return places;
}

}  // namespace capstan::plan
