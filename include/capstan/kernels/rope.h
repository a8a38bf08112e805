// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding in place, half-split: dimension i turns with i + H/2. Legend: N rows
// (tokens), H head size, T dtype of x, A fp64 for fp64, else fp32.
//   a, b = x[i], x[i + H/2]    x[i] = a cos - b sin    x[i + H/2] = b cos + a sin
// backward turns the other way, which is the gradient. Matches src/ops/rope.cpp. Bytes per turned
// element: T read, T written; the table stays in the cache.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

struct RopeArgs {
  DType dtype = DType::kBf16;
  void* x = nullptr;  // T [N, row_stride]: the first heads * head_size features of a row are turned
  int64_t rows = 0, row_stride = 0, heads = 0, head_size = 0;
  const void* cos = nullptr;  // A [length, H/2]
  const void* sin = nullptr;
  const int64_t* positions = nullptr;  // [N], all below length; null: row % rows_per_sample
  int64_t rows_per_sample = 1;
  bool backward = false;
};
void rope(const RopeArgs& args, Stream stream);

}  // namespace capstan::kernels
