// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/fp8.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "capstan/base/check.h"
#include "capstan/ops/gemm.h"
#include "capstan/ops/path.h"
#include "ops/cpu/dtypes.h"
#include "ops/cpu/fp8_kernels.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

constexpr int64_t kGrain = 16384;      // elements of a task
constexpr int64_t kProductRows = 256;  // of the emulated product at a time

bool is_known(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

void check_input(const char* op, const Tensor& x) {
  CAPSTAN_CHECK(is_known(x.scalar_type()), "{}: x is {}, need fp32 or bf16", op,
                c10::toString(x.scalar_type()));
}

kernels::Fp8 kernel_format(Fp8Format format) {
  return format == Fp8Format::kE4m3 ? kernels::Fp8::kE4m3 : kernels::Fp8::kE5m2;
}

// --- the plain loops of the CPU -----------------------------------------------------------------

// Index of the kernels.
size_t element_of(const Tensor& x) { return x.scalar_type() == at::kFloat ? 0 : 1; }
size_t index_of(Fp8Format format) { return format == Fp8Format::kE4m3 ? 0 : 1; }

float scale_of(float largest, Fp8Format format) {
  constexpr float kMost = std::numeric_limits<float>::max();
  if (!(largest > 0) || largest > kMost) return 1;
  const float scale = std::fmin(largest_of(format) / largest, kMost);
  return scale > 0 ? scale : 1;
}

float largest_by_loop(const Tensor& x) {
  const Tensor rows = x.contiguous();
  const auto* const from = static_cast<const char*>(rows.const_data_ptr());
  auto* const largest_in = cpu::fp8_kernels().largest[element_of(rows)];
  return at::parallel_reduce(
      0, rows.numel(), kGrain, 0.0F,
      [&](int64_t begin, int64_t end, float) {
        return largest_in(from + begin * rows.element_size(), end - begin);
      },
      [](float a, float b) { return a > b ? a : b; });
}

Tensor bytes_like(const Tensor& x) { return at::empty(x.sizes(), x.options().dtype(at::kByte)); }

Fp8Matrix cast_by_loop(const Tensor& x_MK, Fp8Format format, const Tensor& largest) {
  const Tensor rows = x_MK.contiguous(), out = bytes_like(rows);
  const float scale = scale_of(*largest.const_data_ptr<float>(), format);
  const auto* const from = static_cast<const char*>(rows.const_data_ptr());
  auto* const to = out.mutable_data_ptr<uint8_t>();
  auto* const cast = cpu::fp8_kernels().cast[element_of(rows)][index_of(format)];
  at::parallel_for(0, rows.numel(), kGrain, [&](int64_t begin, int64_t end) {
    cast(from + begin * rows.element_size(), to + begin, end - begin, scale);
  });
  return {out, at::full({1}, 1 / scale, at::kFloat)};
}

Fp8Matrix cast_rows_by_loop(const Tensor& x_MK, Fp8Format format) {
  const Tensor rows = x_MK.contiguous(), out = bytes_like(rows);
  const int64_t M = rows.size(0), K = rows.size(1);
  const Tensor inverse = at::empty({M, 1}, at::kFloat);
  const auto* const from = static_cast<const char*>(rows.const_data_ptr());
  auto* const to = out.mutable_data_ptr<uint8_t>();
  auto* const inverses = inverse.mutable_data_ptr<float>();
  auto* const largest_in = cpu::fp8_kernels().largest[element_of(rows)];
  auto* const cast = cpu::fp8_kernels().cast[element_of(rows)][index_of(format)];
  at::parallel_for(0, M, cpu::grain(K), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto* const row = from + r * K * rows.element_size();
      const float scale = scale_of(largest_in(row, K), format);
      cast(row, to + r * K, K, scale);
      inverses[r] = 1 / scale;
    }
  });
  return {out, inverse};
}

// --- the kernels of a device --------------------------------------------------------------------

kernels::AmaxArgs amax_args(const Tensor& x, const Tensor& largest) {
  return {.dtype = *on_device::dtype_of(x),
          .values = x.const_data_ptr(),
          .count = x.numel(),
          .amax = largest.mutable_data_ptr<float>()};
}

Fp8Matrix cast_by_kernel(const Tensor& x_MK, Fp8Format format, const Tensor& largest,
                         const QuantiseOptions& options) {
  const Tensor rows = x_MK.contiguous();
  const int64_t M = rows.size(0), K = rows.size(1);
  const bool transposed = options.transposed;
  const Tensor out = at::empty(transposed ? at::IntArrayRef{K, M} : at::IntArrayRef{M, K},
                               rows.options().dtype(at::kByte));
  const Tensor scales = at::empty({2}, largest.options());
  auto* const scale = scales.mutable_data_ptr<float>();
  const kernels::Api& api = *device_kernels();
  api.fp8_scale({.format = kernel_format(format),
                 .amax = largest.const_data_ptr<float>(),
                 .count = 1,
                 .scale = scale,
                 .inverse_scale = scale + 1},
                on_device::stream());
  auto* const to = out.mutable_data_ptr<uint8_t>();
  api.cast_fp8(
      {.dtype = *on_device::dtype_of(rows),
       .format = kernel_format(format),
       .rows = M,
       .columns = K,
       .x = rows.const_data_ptr(),
       .scale = scale,
       .out = transposed ? nullptr : to,
       .transposed = transposed ? to : nullptr,
       .amax = options.observed.defined() ? options.observed.mutable_data_ptr<float>() : nullptr},
      on_device::stream());
  return {out, scales.narrow(0, 1, 1)};
}

Fp8Matrix cast_rows_by_kernel(const Tensor& x_MK, Fp8Format format) {
  const Tensor rows = x_MK.contiguous(), out = bytes_like(rows);
  const Tensor inverse = at::empty({rows.size(0), 1}, rows.options().dtype(at::kFloat));
  device_kernels()->cast_rows_fp8({.dtype = *on_device::dtype_of(rows),
                                   .format = kernel_format(format),
                                   .rows = rows.size(0),
                                   .columns = rows.size(1),
                                   .x = rows.const_data_ptr(),
                                   .out = out.mutable_data_ptr<uint8_t>(),
                                   .inverse_scale = inverse.mutable_data_ptr<float>()},
                                  on_device::stream());
  return {out, inverse};
}

// --- the reference: ATen on any device ----------------------------------------------------------

Tensor sizes_of(const Tensor& x) {
  const Tensor size = x.to(at::kFloat).abs();
  return at::where(size.isnan(), 0.0, size);
}

Tensor scales_of(const Tensor& largest, Fp8Format format) {
  constexpr float kMost = std::numeric_limits<float>::max();
  const Tensor is_usable = largest.gt(0).logical_and(largest.le(kMost));
  const Tensor divisor = at::where(is_usable, largest, 1.0F);
  const Tensor scale = at::full_like(divisor, largest_of(format)).div(divisor).clamp_max(kMost);
  return at::where(is_usable.logical_and(scale.gt(0)), scale, 1.0F);
}

// The cast of ATen makes NaN of what is too large.
Tensor cast_reference(const Tensor& x_MK, const Tensor& scale, Fp8Format format) {
  const float largest = largest_of(format);
  return (x_MK.to(at::kFloat) * scale).clamp(-largest, largest).to(scalar_type_of(format));
}

// --- products -----------------------------------------------------------------------------------

std::array<float, 256> numbers_of(Fp8Format format) {
  std::array<float, 256> numbers{};
  for (size_t i = 0; i < numbers.size(); ++i) {
    const auto bits = static_cast<uint8_t>(i);
    numbers[i] = format == Fp8Format::kE4m3
                     ? static_cast<float>(at::Float8_e4m3fn(bits, at::Float8_e4m3fn::from_bits()))
                     : static_cast<float>(at::Float8_e5m2(bits, at::Float8_e5m2::from_bits()));
  }
  return numbers;
}

// In fp32, which holds every number of fp8.
Tensor widened(const Tensor& x) {
  static const std::array<float, 256> e4m3 = numbers_of(Fp8Format::kE4m3),
                                      e5m2 = numbers_of(Fp8Format::kE5m2);
  const auto& numbers = x.scalar_type() == at::kFloat8_e4m3fn ? e4m3 : e5m2;
  const Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  const auto* const from = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* const to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = numbers[from[i]];
  });
  return out;
}

void multiply_widened(const Tensor& out_MN, const Fp8Matrix& a, const Fp8Matrix& b,
                      bool accumulates, const Tensor& bias_N) {
  const Tensor b_KN = widened(b.values_MK).t();
  const Tensor scale_N = b.inverse_scale.view({-1});
  const bool by_row = a.inverse_scale.dim() == 2;
  for (int64_t first = 0; first < out_MN.size(0); first += kProductRows) {
    const int64_t count = std::min(kProductRows, out_MN.size(0) - first);
    const Tensor product = at::mm(widened(a.values_MK.narrow(0, first, count)), b_KN);
    product.mul_(by_row ? a.inverse_scale.narrow(0, first, count) : a.inverse_scale).mul_(scale_N);
    if (bias_N.defined()) product.add_(bias_N);
    Tensor rows = out_MN.narrow(0, first, count);
    accumulates ? rows.add_(product) : rows.copy_(product);
  }
}

void check_product(const Tensor& out_MN, const Fp8Matrix& a, const Fp8Matrix& b) {
  CAPSTAN_CHECK(a.values_MK.size(1) == b.values_MK.size(1), "fp8 product: {} and {} columns",
                a.values_MK.size(1), b.values_MK.size(1));
  CAPSTAN_CHECK(b.values_MK.scalar_type() == at::kFloat8_e4m3fn, "fp8 product: the second is {}",
                c10::toString(b.values_MK.scalar_type()));
  CAPSTAN_CHECK(is_known(out_MN.scalar_type()), "fp8 product: the result is {}",
                c10::toString(out_MN.scalar_type()));
}

Product product_of(const Tensor& out_MN, const Fp8Matrix& a_MK, const Fp8Matrix& b_NK) {
  return {.out_MN = out_MN,
          .a_MK = a_MK.values_MK,
          .b_KN = b_NK.values_MK.t(),
          .a_scale = a_MK.inverse_scale,
          .b_scale = b_NK.inverse_scale};
}

// The libraries add a bias to bf16 results of its type.
bool joins_product(const Tensor& bias_N, const Tensor& out_MN) {
  return bias_N.defined() && out_MN.scalar_type() == at::kBFloat16 &&
         bias_N.scalar_type() == at::kBFloat16;
}

}  // namespace

at::ScalarType scalar_type_of(Fp8Format format) {
  return format == Fp8Format::kE4m3 ? at::kFloat8_e4m3fn : at::kFloat8_e5m2;
}

float largest_of(Fp8Format format) { return format == Fp8Format::kE4m3 ? 448.0F : 57344.0F; }

Tensor largest_size(const Tensor& x) {
  const Tensor largest = at::zeros({1}, x.options().dtype(at::kFloat).requires_grad(false));
  raise_to_largest_size(largest, x);
  return largest;
}

void raise_to_largest_size(Tensor largest, const Tensor& x) {
  check_input("largest_size", x);
  const at::NoGradGuard no_grad;
  if (x.numel() == 0) return;
  switch (path_of(x)) {
    case Path::kFused: {
      float& top = *largest.mutable_data_ptr<float>();
      top = std::fmax(top, largest_by_loop(x));
      return;
    }
    case Path::kDevice:
      return device_kernels()->amax(amax_args(x.contiguous(), largest), on_device::stream());
    case Path::kReference:
      largest.copy_(at::maximum(largest, sizes_of(x).max()));
  }
}

Fp8Matrix quantise(const Tensor& x_MK, Fp8Format format, const Tensor& largest,
                   const QuantiseOptions& options) {
  check_input("quantise", x_MK);
  const at::NoGradGuard no_grad;
  const at::ScalarType type = scalar_type_of(format);
  const Path path = path_of(x_MK);
  if (path == Path::kDevice) {
    const Fp8Matrix q = cast_by_kernel(x_MK, format, largest, options);
    return {q.values_MK.view(type), q.inverse_scale};
  }
  if (options.observed.defined()) raise_to_largest_size(options.observed, x_MK);
  if (path == Path::kFused) {
    const Fp8Matrix q = cast_by_loop(x_MK, format, largest);
    const Tensor bytes = options.transposed ? q.values_MK.t().contiguous() : q.values_MK;
    return {bytes.view(type), q.inverse_scale};
  }
  const Tensor scale = scales_of(largest, format);
  const Tensor rows = options.transposed ? x_MK.t() : x_MK;
  return {cast_reference(rows.contiguous(), scale, format), scale.reciprocal()};
}

Fp8Matrix quantise_rows(const Tensor& x_MK, Fp8Format format) {
  check_input("quantise_rows", x_MK);
  const at::NoGradGuard no_grad;
  const Path path = path_of(x_MK);
  if (path == Path::kReference || x_MK.numel() == 0) {
    const Tensor scale = scales_of(sizes_of(x_MK).amax({1}, true), format);
    return {cast_reference(x_MK.contiguous(), scale, format), scale.reciprocal()};
  }
  const Fp8Matrix q =
      path == Path::kFused ? cast_rows_by_loop(x_MK, format) : cast_rows_by_kernel(x_MK, format);
  return {q.values_MK.view(scalar_type_of(format)), q.inverse_scale};
}

void multiply_into(const Tensor& out_MN, const Fp8Matrix& a_MK, const Fp8Matrix& b_NK,
                   const Tensor& bias_N) {
  check_product(out_MN, a_MK, b_NK);
  const at::NoGradGuard no_grad;
  const bool joins = joins_product(bias_N, out_MN);
  const Tensor within_N = joins ? bias_N : Tensor();
  if (out_MN.is_cpu()) {
    multiply_widened(out_MN, a_MK, b_NK, false, within_N);
  } else {
    Product product = product_of(out_MN, a_MK, b_NK);
    product.bias_N = within_N;
    multiply(product);
  }
  if (bias_N.defined() && !joins) out_MN.add_(bias_N);
}

bool multiply_wide(const Tensor& out_MN, const Fp8Matrix& a_MK, const Fp8Matrix& b_NK,
                   bool accumulates) {
  if (out_MN.scalar_type() != at::kFloat) return false;
  check_product(out_MN, a_MK, b_NK);
  const at::NoGradGuard no_grad;
  Product product = product_of(out_MN, a_MK, b_NK);
  product.accumulates = accumulates;
  if (!out_MN.is_cpu()) return multiply_by_lt(product);
  multiply_widened(out_MN, a_MK, b_NK, accumulates, {});
  return true;
}

}  // namespace capstan::ops
