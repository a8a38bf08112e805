// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// RMSNorm of each head of q and k, then RoPE. Legend: N rows (tokens), Q and K heads, H head size
// (even, at most 256), T dtype, W weight dtype (T, or fp32 beside bf16), A fp64 for fp64, else
// fp32.
//   r = 1 / sqrt(mean(x^2) + eps) over a head    y = x r weight    out = y turned as in rope.h
// Backward, g = grad turned back: d = g weight, h = x r: dx = r (d - h mean(d h)), grad_weight +=
// sum over rows and heads of g h. Bytes per element: forward T read, T written; backward 2T read, T
// written.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

struct QkNormShape {
  DType dtype = DType::kBf16, weight_dtype = DType::kBf16;
  int64_t rows = 0, q_heads = 0, k_heads = 0, head_size = 0;
  int64_t x_stride = 0;                // elements from row to row of x and dx: q, k, maybe more
  int64_t out_stride = 0;              // of out and grad
  const void* q_weight = nullptr;      // W [H]
  const void* k_weight = nullptr;      // W [H]
  const void* cos = nullptr;           // A [length, H/2]
  const void* sin = nullptr;           // A [length, H/2]
  const int64_t* positions = nullptr;  // [N]; null: row % rows_per_sample
  int64_t rows_per_sample = 1;
};

struct QkNormForwardArgs {
  QkNormShape shape;
  double eps = 1e-6;
  const void* x = nullptr;  // T [N, x_stride]
  void* out = nullptr;      // T [N, out_stride]; may be x when the strides are equal
  void* rstd = nullptr;     // A [N, Q + K]
};
void qk_norm_rope_forward(const QkNormForwardArgs& args, Stream stream);

struct QkNormBackwardArgs {
  QkNormShape shape;
  const void* x = nullptr;     // T [N, x_stride]
  const void* rstd = nullptr;  // A [N, Q + K]
  const void* grad = nullptr;  // T [N, out_stride]
  void* dx = nullptr;  // T [N, x_stride]; q and k parts written; may be grad if strides are equal
  void* grad_q_weight = nullptr;  // A [H], added to; null with grad_k_weight: not wanted
  void* grad_k_weight = nullptr;  // A [H], added to
  void* partial = nullptr;        // A [2, norm_partial_rows(rows), H] work space
};
void qk_norm_rope_backward(const QkNormBackwardArgs& args, Stream stream);

}  // namespace capstan::kernels
