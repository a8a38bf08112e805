// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Second pass of gradients that are summed over rows: partial sums of groups of rows into a total.
#pragma once
#include "dispatch.h"

namespace capstan::kernels {

inline constexpr int kSumColumns = 32, kMostSumLanes = 32;

// total[d] += sum of partial[g][d]: lane after lane of a column, each over every lanes-th group.
template <class A>
__global__ void __launch_bounds__(kSumColumns* kMostSumLanes)
    sum_partial(const A* partial, int64_t groups, int64_t width, A* total) {
  __shared__ A part[kMostSumLanes][kSumColumns];
  const int lanes = static_cast<int>(blockDim.x) / kSumColumns;
  const int column = static_cast<int>(threadIdx.x) % kSumColumns;
  const int lane = static_cast<int>(threadIdx.x) / kSumColumns;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kSumColumns + column;
  A sum = 0;
  if (d < width)
    for (int64_t g = lane; g < groups; g += lanes) sum += partial[g * width + d];
  part[lane][column] = sum;
  __syncthreads();
  if (lane != 0 || d >= width) return;
  for (int i = 1; i < lanes; ++i) sum += part[i][column];
  total[d] += sum;
}

// Table number `which` of the work space, [groups, width] each.
template <class A>
void launch_sum_partial(const char* name, const void* partial, int which, int64_t groups,
                        int64_t width, void* total, Stream stream) {
  const int lanes = groups < kMostSumLanes ? static_cast<int>(groups) : kMostSumLanes;
  const A* const table = static_cast<const A*>(partial) + which * groups * width;
  launch(name, {(width + kSumColumns - 1) / kSumColumns, kSumColumns * lanes, 0}, stream,
         sum_partial<A>, table, groups, width, static_cast<A*>(total));
}

}  // namespace capstan::kernels
