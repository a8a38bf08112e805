// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "gemm_ceiling.h"

#include <ATen/core/grad_mode.h>

#include "capstan/base/env.h"

namespace capstan::bench {
namespace {

// Seconds of the second of two equal products a b; the first fetches what both read and write.
double seconds_of(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  at::mm_out(out, a, b);
  const int64_t begin = monotonic_ns();
  at::mm_out(out, a, b);
  return static_cast<double>(monotonic_ns() - begin) * 1e-9;
}

}  // namespace

GemmCeiling::GemmCeiling(const plan::ModelShape& shape, int64_t tokens, at::ScalarType type)
    : tokens_(tokens), type_(type) {
  const int64_t hidden = shape.hidden_size, heads = shape.num_attention_heads * shape.head_dim;
  layers_ = {
      {hidden, heads + 2 * shape.num_key_value_heads * shape.head_dim, shape.num_hidden_layers},
      {heads, hidden, shape.num_hidden_layers},
      {hidden, 2 * shape.intermediate_size, shape.num_hidden_layers},
      {shape.intermediate_size, hidden, shape.num_hidden_layers},
      {hidden, shape.vocab_size, 1}};
}

GemmCeiling::Work GemmCeiling::measure(const Layer& layer) const {
  const at::Tensor x_ND = at::ones({tokens_, layer.inputs}, type_);
  const at::Tensor w_OD = at::ones({layer.outputs, layer.inputs}, type_);
  const at::Tensor dy_NO = at::ones({tokens_, layer.outputs}, type_);
  const double seconds =
      seconds_of(x_ND, w_OD.t()) + seconds_of(dy_NO, w_OD) + seconds_of(dy_NO.t(), x_ND);
  const auto times = static_cast<double>(layer.times);
  const double gflop = 6e-9 * static_cast<double>(tokens_) * static_cast<double>(layer.inputs) *
                       static_cast<double>(layer.outputs);
  return {times * gflop, times * seconds};
}

void GemmCeiling::sample() {
  const at::NoGradGuard no_grad;
  constexpr int64_t kSide = 2048;
  const at::Tensor square = at::ones({kSide, kSide}, type_);
  rates_.square.push_back(2e-9 * kSide * kSide * kSide / seconds_of(square, square));
  Work sum;
  for (const Layer& layer : layers_) {
    const Work work = measure(layer);
    sum.gflop += work.gflop;
    sum.seconds += work.seconds;
  }
  rates_.own.push_back(sum.gflop / sum.seconds);
}

}  // namespace capstan::bench
