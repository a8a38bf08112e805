// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Residual add with RMSNorm or LayerNorm. Legend: N rows, D features, R residual dtype, C compute
// dtype, A statistics (fp64 for fp64, else fp32), G rows of `partial`.
//   s = round_R(residual + hidden)       m = mean(s), or 0 for RMSNorm
//   r = 1 / sqrt(mean((s - m)^2) + eps)  normed = (s - m) r weight [+ bias]
// Backward with g = grad weight, h = (s - m) r:
//   ds = r (g - [mean(g)] - h mean(g h)) [+ grad_residual]
//   grad_weight += sum_N grad h          grad_bias += sum_N grad
// Matches src/ops/norm.cpp. Bytes per element: forward R + C read, R + C written (R read, C
// written without hidden); backward R + C read (+ R), R written (+ C).
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

// (residual, compute): (fp32, fp32), (fp32, bf16), (bf16, bf16), (fp64, fp64). weight and bias have
// the compute dtype, or fp32 beside bf16.
struct NormTypes {
  DType residual = DType::kFp32, compute = DType::kFp32, weight = DType::kFp32;
};
// Widest rows: 2048 vectors of 16 bytes of the compute dtype (16384 elements of bf16), or 8192
// elements when the width or a pointer does not fit vectors.
struct NormShape {
  int64_t rows = 0, width = 0;
};

struct NormForwardArgs {
  NormTypes types;
  NormShape shape;
  double eps = 1e-5;
  const void* residual = nullptr;  // R [N, D]
  const void* hidden = nullptr;    // C [N, D], or null
  const void* weight = nullptr;    // [D]
  const void* bias = nullptr;      // [D]; LayerNorm only, may be null
  void* sum = nullptr;             // R [N, D]; unused without hidden; may be residual
  void* normed = nullptr;          // C [N, D]
  void* mean = nullptr;            // A [N]; LayerNorm only
  void* rstd = nullptr;            // A [N]
};
void rms_norm_forward(const NormForwardArgs& args, Stream stream);
void layer_norm_forward(const NormForwardArgs& args, Stream stream);

struct NormBackwardArgs {
  NormTypes types;
  NormShape shape;
  const void* x = nullptr;  // R [N, D]: the sum, or the residual without hidden
  const void* mean = nullptr;
  const void* rstd = nullptr;
  const void* weight = nullptr;
  const void* grad = nullptr;           // C [N, D]
  const void* grad_residual = nullptr;  // R [N, D], or null
  void* dx = nullptr;                   // R [N, D]; may be grad_residual
  void* d_hidden = nullptr;             // C [N, D]: dx once more, or null
  void* grad_weight = nullptr;          // A [D], added to; null: not wanted
  void* grad_bias = nullptr;            // A [D], added to; LayerNorm only, may be null
  void* partial = nullptr;              // A [2, G, D] work space, G = norm_partial_rows(rows)
};
void rms_norm_backward(const NormBackwardArgs& args, Stream stream);
void layer_norm_backward(const NormBackwardArgs& args, Stream stream);

// Depends on nothing but the rows, so that every GPU adds in the same order.
[[nodiscard]] int64_t norm_partial_rows(int64_t rows);

}  // namespace capstan::kernels
