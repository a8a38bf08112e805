// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Residual add + RMSNorm: s = residual + hidden, r = 1 / sqrt(mean(s^2) + eps), normed = s r w.
// Backward: ds = r (g - h mean(g h)) + grad_residual with g = grad w, h = s r; dw = sum grad h,
// made in two passes: per group of rows, then over groups. Memory per element, fp32 residual beside
// bf16: forward 6 bytes read, 6 written; backward 10 read, 4 written (+ 2). Reference:
// src/ops/norm.cpp, tests/kernels/reference_norm.cpp.
#include "norm_rows.cuh"

namespace capstan::kernels {

void rms_norm_forward(const NormForwardArgs& args, Stream stream) {
  check_sizes("rms_norm_forward", {args.shape.rows, args.shape.width});
  if (args.shape.rows == 0 || args.shape.width == 0) return;
  check_present("rms_norm_forward", {{"residual", args.residual},
                                     {"weight", args.weight},
                                     {"normed", args.normed},
                                     {"rstd", args.rstd}});
  if (args.hidden) check_present("rms_norm_forward", {{"sum", args.sum}});
  require(args.bias == nullptr, "rms_norm_forward", "a bias, which RMSNorm has not");
  launch_forward<false>("rms_norm_forward", args, stream);
}

void rms_norm_backward(const NormBackwardArgs& args, Stream stream) {
  check_sizes("rms_norm_backward", {args.shape.rows, args.shape.width});
  if (args.shape.rows == 0 || args.shape.width == 0) return;
  check_present("rms_norm_backward", {{"x", args.x},
                                      {"rstd", args.rstd},
                                      {"weight", args.weight},
                                      {"grad", args.grad},
                                      {"dx", args.dx}});
  if (args.grad_weight) check_present("rms_norm_backward", {{"partial", args.partial}});
  require(args.grad_bias == nullptr && args.mean == nullptr, "rms_norm_backward",
          "a bias or mean, which RMSNorm has not");
  launch_backward<false>("rms_norm_backward", args, stream);
}

int64_t norm_partial_rows(int64_t rows) { return row_groups(rows).groups; }

}  // namespace capstan::kernels
