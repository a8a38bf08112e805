// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Matrices in fp8 with scales kept on their device, and the product of two. The cast is that of
// kernels/fp8.h: q = fp8(x scale) to nearest even, saturating, NaN stays NaN; scale = largest
// number of the format / maximum of |x|. On the CPU it is the same arithmetic in plain loops (an
// emulation, for tests and small runs: no CPU multiplies fp8 faster than bf16); on a device the
// kernels of the plug-in and at::_scaled_mm. Legend: M, N rows, K columns, the contracted ones.
#pragma once
#include <ATen/core/Tensor.h>

namespace capstan::ops {

using at::Tensor;

enum class Fp8Format { kE4m3, kE5m2 };  // largest numbers 448 and 57344
[[nodiscard]] at::ScalarType scalar_type_of(Fp8Format format);
[[nodiscard]] float largest_of(Fp8Format format);

// x is about values * inverse_scale.
struct Fp8Matrix {
  Tensor values_MK;      // fp8, contiguous
  Tensor inverse_scale;  // fp32: [1], or [M, 1] with a scale per row
};

// One number, fp32 [1]: the largest |x|; NaN does not count.
[[nodiscard]] Tensor largest_size(const Tensor& x);
// The same, joined into `largest` (fp32 [1], not negative).
void raise_to_largest_size(Tensor largest, const Tensor& x);

struct QuantiseOptions {
  bool transposed = false;  // of x^T, [K, M]
  Tensor observed = {};     // fp32 [1]: raise_to_largest_size on the way
};
// x bf16 or fp32 [M, K]. One scale, from `largest` (fp32 [1]): 1 where that is 0 or infinite.
// Larger numbers saturate.
[[nodiscard]] Fp8Matrix quantise(const Tensor& x_MK, Fp8Format format, const Tensor& largest,
                                 const QuantiseOptions& options = {});
// A scale per row, from its own maximum.
[[nodiscard]] Fp8Matrix quantise_rows(const Tensor& x_MK, Fp8Format format);

// out [M, N] (bf16 or fp32) = a b^T (+ bias): products summed in fp32, multiplied with the scales
// in fp32, rounded once. b is e4m3; both have one scale or both a scale per row. A bias of another
// type than out is added to the rounded result. Devices need K and N to be multiples of 16, and out
// bf16 with scales per row.
void multiply_into(const Tensor& out_MN, const Fp8Matrix& a_MK, const Fp8Matrix& b_NK,
                   const Tensor& bias_N = {});
// The same (+ out) in fp32, added before anything is rounded to 16 bits. False, and nothing done,
// where out is not fp32 and on devices whose products are LibTorch's (gemm.h), which has no such
// call.
[[nodiscard]] bool multiply_wide(const Tensor& out_MN, const Fp8Matrix& a_MK, const Fp8Matrix& b_NK,
                                 bool accumulates);

}  // namespace capstan::ops
