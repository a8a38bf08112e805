// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a product is to cuBLASLt, and its form in LibTorch. A matrix of rows is one of columns when
// it is read transposed, so out = a b becomes out^T = b^T a^T: cuBLASLt's A is b, its B is a, and
// the bias of a column of out is that of a row of D. Sums over rows of a are those of columns of B.
#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/ops/gelu.h"
#include "capstan/ops/gemm.h"
#include "capstan/ops/path.h"
#include "ops/gemm_internal.h"

namespace capstan::ops {
namespace {

constexpr int64_t kMostAlignment = 16, kFp8Side = 16, kAuxStep = 8;

std::optional<LtType> lt_type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return LtType::kFp32;
    case at::kBFloat16:
      return LtType::kBf16;
    case at::kHalf:
      return LtType::kFp16;
    case at::kFloat8_e4m3fn:
      return LtType::kE4m3;
    case at::kFloat8_e5m2:
      return LtType::kE5m2;
    default:
      return std::nullopt;
  }
}

bool is_fp8(LtType type) { return type == LtType::kE4m3 || type == LtType::kE5m2; }
bool is_narrow(LtType type) { return type == LtType::kBf16 || type == LtType::kFp16; }

const char* name_of(LtType type) {
  constexpr const char* kNames[] = {"fp32", "bf16", "fp16", "e4m3", "e5m2"};
  return kNames[static_cast<size_t>(type)];
}

const char* text_of(LtEpilogue epilogue) {
  constexpr const char* kTexts[] = {"", ", bias", ", bias, GELU", ", GELU's derivative",
                                    ", bias gradient"};
  return kTexts[static_cast<size_t>(epilogue)];
}

// A matrix seen transposed, column-major: `transposed` when its own columns lie together.
struct Seen {
  LtMatrix matrix;
  bool transposed = false;
};

std::optional<Seen> seen_transposed(const Tensor& x) {
  const auto type = lt_type_of(x.scalar_type());
  if (!type || x.dim() != 2 || x.numel() == 0) return std::nullopt;
  const int64_t rows = x.size(0), columns = x.size(1);
  // The distance of a single row or column says nothing.
  const int64_t by_row = rows > 1 ? x.stride(0) : columns;
  const int64_t by_column = columns > 1 ? x.stride(1) : rows;
  if ((columns == 1 || x.stride(1) == 1) && by_row >= columns)
    return Seen{{*type, columns, rows, by_row}, false};
  if ((rows == 1 || x.stride(0) == 1) && by_column >= rows)
    return Seen{{*type, rows, columns, by_column}, true};
  return std::nullopt;
}

bool have_types(const LtProblem& p) {
  if (p.scale == LtScale::kNone)
    return is_narrow(p.a.type) && p.a.type == p.b.type &&
           (p.d.type == p.a.type || p.d.type == LtType::kFp32);
  return is_fp8(p.a.type) && is_fp8(p.b.type) &&
         (p.a.type == LtType::kE4m3 || p.b.type == LtType::kE4m3) &&
         (p.d.type == LtType::kBf16 || p.d.type == LtType::kFp32);
}

// Tensor cores read fp8 along the contracted dim only, 16 bytes at a time.
bool has_fp8_layout(const LtProblem& p) {
  const auto fits = [](int64_t n) { return n % kFp8Side == 0; };
  return p.a_transposed && !p.b_transposed && fits(p.depth()) && fits(p.d.rows) &&
         fits(p.d.columns) && fits(p.a.leading) && fits(p.b.leading) && p.alignment == kFp8Side;
}

int64_t alignment_of(std::initializer_list<const Tensor*> tensors) {
  int64_t alignment = kMostAlignment;
  for (const Tensor* x : tensors) {
    if (!x->defined()) continue;
    const auto address = reinterpret_cast<uintptr_t>(x->const_data_ptr());
    while (address % static_cast<uintptr_t>(alignment) != 0) alignment /= 2;
  }
  return alignment;
}

LtScale scale_of(const Product& p) {
  if (!p.a_scale.defined()) return LtScale::kNone;
  return p.a_scale.dim() == 2 ? LtScale::kRow : LtScale::kTensor;
}

void check(const Product& p) {
  const auto shape = [](const Tensor& x) {
    return fmt::format("[{}]", fmt::join(x.sizes(), ", "));
  };
  CAPSTAN_CHECK(p.a_MK.dim() == 2 && p.b_KN.dim() == 2 && p.out_MN.dim() == 2 &&
                    p.a_MK.size(1) == p.b_KN.size(0) && p.out_MN.size(0) == p.a_MK.size(0) &&
                    p.out_MN.size(1) == p.b_KN.size(1),
                "product: {} x {} -> {}", shape(p.a_MK), shape(p.b_KN), shape(p.out_MN));
  const int more = p.sum_MN.defined() + p.gelu_at_MN.defined() + p.row_sums_M.defined();
  const auto is_like_out = [&p](const Tensor& x) {
    return !x.defined() || (!p.accumulates && x.sizes() == p.out_MN.sizes() && x.is_contiguous() &&
                            p.out_MN.is_contiguous() && x.scalar_type() == p.out_MN.scalar_type());
  };
  CAPSTAN_CHECK(more <= 1 && is_like_out(p.sum_MN) && is_like_out(p.gelu_at_MN),
                "product: {} more matrices or sums beside {}, or not as that is", more,
                shape(p.out_MN));
  CAPSTAN_CHECK(!p.row_sums_M.defined() ||
                    (p.row_sums_M.is_contiguous() && p.row_sums_M.numel() == p.out_MN.size(0)),
                "product: sums of {} rows as {}", p.out_MN.size(0), shape(p.row_sums_M));
  if (!p.bias_N.defined()) return;
  const bool is_wide_fp8 = p.a_scale.defined() && p.out_MN.scalar_type() == at::kFloat;
  CAPSTAN_CHECK(
      !p.accumulates && !is_wide_fp8 && p.bias_N.is_contiguous() &&
          p.bias_N.numel() == p.out_MN.size(1) && p.bias_N.scalar_type() == p.out_MN.scalar_type(),
      "product: a bias of {} {} on {} {}", shape(p.bias_N), c10::toString(p.bias_N.scalar_type()),
      shape(p.out_MN), c10::toString(p.out_MN.scalar_type()));
}

LtEpilogue epilogue_of(const Product& p) {
  if (p.sum_MN.defined()) return LtEpilogue::kGeluBias;
  if (p.gelu_at_MN.defined()) return LtEpilogue::kGeluGradient;
  if (p.row_sums_M.defined()) return LtEpilogue::kBiasGradient;
  return p.bias_N.defined() ? LtEpilogue::kBias : LtEpilogue::kNone;
}

// What the library documents for epilogues: GELU on 16-bit results with a bias forward, sums of the
// type of the result, which is to be fp32. None in fp8 but the bias.
bool has_epilogue(const LtProblem& p, const Product& product) {
  switch (p.epilogue) {
    case LtEpilogue::kNone:
      return true;
    case LtEpilogue::kBias:
      return p.scale == LtScale::kNone || p.d.type == LtType::kBf16;
    case LtEpilogue::kBiasGradient:
      return p.scale == LtScale::kNone && p.d.type == LtType::kFp32 &&
             product.row_sums_M.scalar_type() == at::kFloat;
    case LtEpilogue::kGeluBias:
    case LtEpilogue::kGeluGradient:
      return p.scale == LtScale::kNone && is_narrow(p.d.type) && p.d.rows % kAuxStep == 0 &&
             p.alignment == kMostAlignment &&
             product.bias_N.defined() == (p.epilogue == LtEpilogue::kGeluBias);
  }
  return false;
}

std::optional<Tensor> bias_of(const Product& p) {
  return p.bias_N.defined() ? std::optional(p.bias_N) : std::nullopt;
}

void multiply_fp8(const Product& p) {
  const bool by_row = p.b_scale.dim() == 2;
  Tensor out = p.out_MN;
  at::_scaled_mm_out(out, p.a_MK, p.b_KN, p.a_scale, by_row ? p.b_scale.t() : p.b_scale, bias_of(p),
                     std::nullopt, out.scalar_type(), /*use_fast_accum=*/false);
}

}  // namespace

std::optional<LtProblem> lt_problem_of(const Product& product) {
  const auto a = seen_transposed(product.b_KN), b = seen_transposed(product.a_MK),
             d = seen_transposed(product.out_MN);
  if (!a || !b || !d || d->transposed) return std::nullopt;
  const LtProblem problem{
      .a = a->matrix,
      .b = b->matrix,
      .d = d->matrix,
      .a_transposed = a->transposed,
      .b_transposed = b->transposed,
      .accumulates = product.accumulates,
      .epilogue = epilogue_of(product),
      .scale = scale_of(product),
      .alignment = alignment_of({&product.out_MN, &product.a_MK, &product.b_KN, &product.bias_N,
                                 &product.sum_MN, &product.gelu_at_MN, &product.row_sums_M})};
  if (!have_types(problem)) return std::nullopt;
  if (problem.scale != LtScale::kNone && !has_fp8_layout(problem)) return std::nullopt;
  if (!has_epilogue(problem, product)) return std::nullopt;
  return problem;
}

bool is_fused(const LtProblem& problem) { return problem.epilogue > LtEpilogue::kBias; }

LtProblem plain_of(const LtProblem& problem) {
  LtProblem plain = problem;
  if (!is_fused(problem)) return plain;
  const bool has_bias = problem.epilogue == LtEpilogue::kGeluBias;
  plain.epilogue = has_bias ? LtEpilogue::kBias : LtEpilogue::kNone;
  return plain;
}

bool has_libtorch_form(const LtProblem& problem) {
  return !is_fused(problem) && (problem.scale == LtScale::kNone || problem.d.type == LtType::kBf16);
}

double flops_of(const LtProblem& problem) {
  return 2.0 * static_cast<double>(problem.d.rows) * static_cast<double>(problem.d.columns) *
         static_cast<double>(problem.depth());
}

std::string shape_text(const LtProblem& p) {
  const bool is_even = p.a.type == p.b.type;
  return fmt::format("{} x {} x {} {}{} -> {}{}{}", p.d.columns, p.d.rows, p.depth(),
                     name_of(p.b.type), is_even ? "" : fmt::format(" {}", name_of(p.a.type)),
                     name_of(p.d.type), p.accumulates ? ", accumulated" : "", text_of(p.epilogue));
}

void multiply_by_libtorch(const Product& p) {
  check(p);
  Tensor out = p.out_MN;
  CAPSTAN_CHECK(epilogue_of(p) <= LtEpilogue::kBias, "a fused product has no form in LibTorch");
  const bool is_wide = out.scalar_type() != p.a_MK.scalar_type();
  if (p.a_scale.defined()) {
    CAPSTAN_CHECK(!p.accumulates, "an fp8 product that accumulates has no form in LibTorch");
    return multiply_fp8(p);
  }
  if (p.bias_N.defined())
    at::addmm_out(out, p.bias_N, p.a_MK, p.b_KN);
  else if (p.accumulates && is_wide)
    at::addmm_out(out, out, p.a_MK, p.b_KN, out.scalar_type());
  else if (p.accumulates)
    out.addmm_(p.a_MK, p.b_KN);
  else if (is_wide)
    at::mm_out(out, p.a_MK, p.b_KN, out.scalar_type());
  else
    at::mm_out(out, p.a_MK, p.b_KN);
}

bool multiply_by_lt(const Product& product) {
  if (product.out_MN.is_cpu() || path() != Path::kFused) return false;
  check(product);
  const std::shared_ptr<Gemm> gemm = Gemm::shared();
  return gemm && gemm->multiply(product);
}

Product plain_of(const Product& product) {
  Product plain = product;
  if (product.sum_MN.defined()) plain.out_MN = product.sum_MN;
  plain.sum_MN = plain.gelu_at_MN = plain.row_sums_M = Tensor();
  return plain;
}

void finish(const Product& p) {
  if (p.sum_MN.defined()) gelu_into(p.out_MN, p.sum_MN, GeluForm::kTanh);
  if (p.gelu_at_MN.defined()) gelu_gradient_into(p.out_MN, p.gelu_at_MN, p.out_MN, GeluForm::kTanh);
  if (p.row_sums_M.defined()) {
    Tensor sums = p.row_sums_M;
    at::sum_out(sums, p.a_MK, {1}, false, sums.scalar_type());
  }
}

void multiply(const Product& product) {
  if (multiply_by_lt(product)) return;
  if (epilogue_of(product) > LtEpilogue::kBias) {
    check(product);
    multiply(plain_of(product));
    return finish(product);
  }
  if (!is_for_tiles(product)) return multiply_by_libtorch(product);
  check(product);
  multiply_on_tiles(product);
}

}  // namespace capstan::ops
