// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// SwiGLU, GEGLU and GELU. Legend: N rows, F features, T dtype.
//   gated:     out[f] = act(x[f]) x[F + f], x [N, 2F]      else  out[f] = act(x[f]), x [N, F]
//   silu       g / (1 + exp(-g))
//   gelu_tanh  g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))
//   gelu_erf   g/2 (1 + erf(g / sqrt(2)))
// Matches src/ops/swiglu.cpp. Bytes per output element: gated forward 2T read, T written, backward
// 3T read, 2T written; else T and T, 2T and T.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

enum class Activation { kSilu, kGeluTanh, kGeluErf };

struct ActivationArgs {
  DType dtype = DType::kBf16;
  Activation activation = Activation::kSilu;
  bool gated = true;
  int64_t rows = 0, features = 0;
  const void* x = nullptr;
  const void* grad = nullptr;  // T [N, F]; backward only
  void* out = nullptr;         // forward T [N, F]; backward like x, may be x or, not gated, grad
};
void activation_forward(const ActivationArgs& args, Stream stream);
void activation_backward(const ActivationArgs& args, Stream stream);

}  // namespace capstan::kernels
