// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "config.h"

#include <algorithm>

namespace capstan::kernels {
namespace {

constexpr int kFlatThreads = 256;
constexpr int64_t kFlatBlocks = 4096;  // a few waves of any GPU
constexpr int kRowThreads = 256;
constexpr int64_t kMostGroups = 512, kLeastRowsPerGroup = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int whole_warps(int64_t threads) { return static_cast<int>(ceil_div(threads, kWarp) * kWarp); }

}  // namespace

LaunchShape flat_shape(int64_t items, int64_t per_thread) {
  const int64_t blocks = ceil_div(items, kFlatThreads * per_thread);
  return {std::clamp<int64_t>(blocks, 1, kFlatBlocks), kFlatThreads, 0};
}

RowShape row_shape(int64_t width, int vector, bool aligned) {
  RowShape shape;
  shape.vector = aligned && width % vector == 0 ? vector : 1;
  const int64_t pieces = ceil_div(width, shape.vector);
  if (shape.vector > 1)
    shape.chunks = pieces <= kMostRowThreads ? 1 : 4;
  else
    shape.chunks = 16;
  shape.threads_per_row = whole_warps(std::max<int64_t>(1, ceil_div(pieces, shape.chunks)));
  if (shape.threads_per_row > kMostRowThreads) return {shape.vector, 0, 0, 0};
  shape.rows_per_block = std::max(1, kRowThreads / shape.threads_per_row);
  return shape;
}

RowGroups row_groups(int64_t rows) {
  if (rows == 0) return {0, 0};
  const int64_t per_group = std::max(kLeastRowsPerGroup, ceil_div(rows, kMostGroups));
  return {ceil_div(rows, per_group), per_group};
}

int threads_for_row(int64_t width, int per_thread, int most) {
  return std::clamp(whole_warps(ceil_div(width, per_thread)), kWarp, most);
}

}  // namespace capstan::kernels
