// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Norms, rotary positions, activations and fp8 casts.
#include <fmt/format.h>

#include "cases.h"
#include "timing.h"

namespace capstan::bench {
namespace {

using namespace kernels;

void norm(int64_t rows, int64_t width, DType residual) {
  const int64_t r = residual == k32 ? 4 : 2, n = rows * width;
  const DeviceMemory x(size(n, r)), hidden(size(n, 2)), weight(size(width, 2)), sum(size(n, r)),
      normed(size(n, 2)), mean(size(rows, 4)), rstd(size(rows, 4)), grad_weight(size(width, 4)),
      grad_bias(size(width, 4)), partial(size(2 * api().norm_partial_rows(rows) * width, 4));
  const NormTypes types{residual, k16, k16};
  NormForwardArgs f{.types = types,
                    .shape = {rows, width},
                    .residual = x.data(),
                    .hidden = hidden.data(),
                    .weight = weight.data(),
                    .sum = sum.data(),
                    .normed = normed.data(),
                    .rstd = rstd.data()};
  NormBackwardArgs b{.types = types,
                     .shape = {rows, width},
                     .x = sum.data(),
                     .rstd = rstd.data(),
                     .weight = weight.data(),
                     .grad = hidden.data(),
                     .grad_residual = x.data(),
                     .dx = x.data(),
                     .d_hidden = residual == k32 ? normed.data() : nullptr,
                     .grad_weight = grad_weight.data(),
                     .partial = partial.data()};
  const double forward_bytes = static_cast<double>(n * (2 * r + 4));
  const double backward_bytes = static_cast<double>(n * (3 * r + 2 + (residual == k32 ? 2 : 0)));
  const std::string shape =
      fmt::format("{}, residual {}", shape_text(rows, width), name_of(residual));
  report("rms_norm_forward", shape, forward_bytes,
         median_us([&](Stream s) { api().rms_norm_forward(f, s); }));
  report("rms_norm_backward", shape, backward_bytes,
         median_us([&](Stream s) { api().rms_norm_backward(b, s); }));
  f.mean = mean.data();
  b.mean = mean.data();
  b.grad_bias = grad_bias.data();
  report("layer_norm_forward", shape, forward_bytes,
         median_us([&](Stream s) { api().layer_norm_forward(f, s); }));
  report("layer_norm_backward", shape, backward_bytes,
         median_us([&](Stream s) { api().layer_norm_backward(b, s); }));
}

void rope(int64_t rows, int64_t heads, int64_t head_size) {
  const int64_t width = heads * head_size, length = 4096;
  const DeviceMemory x(size(rows * width, 2)), table(size(length * head_size / 2, 4));
  const RopeArgs args{.dtype = k16,
                      .x = x.data(),
                      .rows = rows,
                      .row_stride = width,
                      .heads = heads,
                      .head_size = head_size,
                      .cos = table.data(),
                      .sin = table.data(),
                      .rows_per_sample = length};
  report("rope", fmt::format("{} x {} x {}", rows, heads, head_size),
         static_cast<double>(rows * width * 4), median_us([&](Stream s) { api().rope(args, s); }));
}

void qk_norm(int64_t rows, int64_t q_heads, int64_t k_heads, int64_t head_size) {
  const int64_t width = (q_heads + k_heads) * head_size, length = 4096;
  const DeviceMemory x(size(rows * width, 2)), out(size(rows * width, 2)),
      rstd(size(rows * (q_heads + k_heads), 4)), weight(size(head_size, 2)),
      table(size(length * head_size / 2, 4)), grad_weight(size(2 * head_size, 4)),
      partial(size(2 * api().norm_partial_rows(rows) * head_size, 4));
  const QkNormShape shape{.rows = rows,
                          .q_heads = q_heads,
                          .k_heads = k_heads,
                          .head_size = head_size,
                          .x_stride = width,
                          .out_stride = width,
                          .q_weight = weight.data(),
                          .k_weight = weight.data(),
                          .cos = table.data(),
                          .sin = table.data(),
                          .rows_per_sample = length};
  const std::string text = fmt::format("{} x ({} + {}) x {}", rows, q_heads, k_heads, head_size);
  const double n = static_cast<double>(rows * width);
  report("qk_norm_rope_forward", text, n * 4, median_us([&](Stream s) {
           api().qk_norm_rope_forward(
               {.shape = shape, .x = x.data(), .out = out.data(), .rstd = rstd.data()}, s);
         }));
  report("qk_norm_rope_backward", text, n * 6, median_us([&](Stream s) {
           api().qk_norm_rope_backward({.shape = shape,
                                        .x = x.data(),
                                        .rstd = rstd.data(),
                                        .grad = out.data(),
                                        .dx = out.data(),
                                        .grad_q_weight = grad_weight.as<float>(),
                                        .grad_k_weight = grad_weight.as<float>() + head_size,
                                        .partial = partial.data()},
                                       s);
         }));
}

void activation(int64_t rows, int64_t features, Activation kind, bool gated, const char* name) {
  const int64_t parts = gated ? 2 : 1, n = rows * features;
  const DeviceMemory x(size(n * parts, 2)), grad(size(n, 2)), out(size(n * parts, 2));
  ActivationArgs args{.dtype = k16,
                      .activation = kind,
                      .gated = gated,
                      .rows = rows,
                      .features = features,
                      .x = x.data(),
                      .grad = nullptr,
                      .out = out.data()};
  const std::string shape = shape_text(rows, features) + ", " + name;
  report("activation_forward", shape, static_cast<double>(n * 2 * (parts + 1)),
         median_us([&](Stream s) { api().activation_forward(args, s); }));
  args.grad = grad.data();
  report("activation_backward", shape, static_cast<double>(n * 2 * (2 * parts + 1)),
         median_us([&](Stream s) { api().activation_backward(args, s); }));
}

void fp8(int64_t rows, int64_t columns) {
  const int64_t n = rows * columns;
  const DeviceMemory x(size(n, 2)), out(size(n, 1)), transposed(size(n, 1)), scale(4), top(4),
      maxima(size(rows, 4)), scales(size(rows, 4)), inverse(size(rows, 4));
  CastFp8Args args{.rows = rows,
                   .columns = columns,
                   .x = x.data(),
                   .scale = scale.as<float>(),
                   .out = out.as<uint8_t>(),
                   .transposed = transposed.as<uint8_t>(),
                   .amax = top.as<float>()};
  const std::string text = shape_text(rows, columns);
  const double elements = static_cast<double>(n);
  report("cast_fp8", text + ", transposed too, amax", elements * 4,
         median_us([&](Stream s) { api().cast_fp8(args, s); }));
  report("amax", text, elements * 2, median_us([&](Stream s) {
           api().amax({k16, x.data(), n, top.as<float>()}, s);
         }));
  report("cast_rows_fp8", text, elements * 3, median_us([&](Stream s) {
           api().cast_rows_fp8(
               {k16, Fp8::kE4m3, rows, columns, x.data(), out.as<uint8_t>(), inverse.as<float>()},
               s);
         }));
  report("fp8_scale", fmt::format("{}", rows), static_cast<double>(rows * 12),
         median_us([&](Stream s) {
           api().fp8_scale({Fp8::kE4m3, maxima.as<float>(), rows, false, scales.as<float>(),
                            inverse.as<float>()},
                           s);
         }));
}

}  // namespace

std::string shape_text(int64_t rows, int64_t width) { return fmt::format("{} x {}", rows, width); }

void run_layers(const Scale& scale) {
  const int64_t rows = 16384 / scale.rows;
  for (const int64_t width : {768, 2048, 4096, 8192}) norm(rows, width / scale.width, k16);
  norm(rows, 2048 / scale.width, k32);
  rope(rows, 32, 128);
  rope(rows, 16, 64);
  qk_norm(rows, 16, 8, 128);
  activation(rows, 8192 / scale.width, Activation::kSilu, true, "SwiGLU");
  activation(rows, 8192 / scale.width, Activation::kGeluTanh, true, "GEGLU");
  activation(rows, 3072 / scale.width, Activation::kGeluTanh, false, "GELU by tanh");
  activation(rows, 3072 / scale.width, Activation::kGeluErf, false, "GELU by erf");
  fp8(rows, 4096 / scale.width);
}

}  // namespace capstan::bench
