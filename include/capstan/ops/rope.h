// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding (RoPE), in the half-split form of Hugging Face Llama: dimension i turns
// with i + H/2. Legend: B samples, T tokens, X features of all heads, H head size.
#pragma once
#include "capstan/ops/record.h"

namespace capstan::ops {

struct RopeTable {
  Tensor cos, sin;  // [length, H/2]; fp64 for fp64, else fp32; read-only
};
// Made once per (theta, head size, dtype, device) and kept for the process, at least `length` long
// (grown by doubling). Thread-safe.
[[nodiscard]] RopeTable rope_table(double theta, int64_t head_size, int64_t length,
                                   at::ScalarType dtype, at::Device device = at::kCPU);

struct RopeSpec {
  double theta = 10000.0;
  int64_t head_size = 0;
  int64_t heads = 0;   // the first `heads` heads of a row are turned (q and k; not v)
  int64_t length = 0;  // positions lie below it; needed where they are not on the CPU
};

// Turns heads of x [B, T, X] by positions_BT (int64); undefined positions: every row is 0 .. T-1.
// Works in place: x is consumed, the result shares its memory.
[[nodiscard]] Tensor rope(const Tensor& x_BTX, const Tensor& positions_BT, const RopeSpec& spec);

}  // namespace capstan::ops
