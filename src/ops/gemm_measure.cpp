// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which algorithm is fastest: candidates and their rival take turns, and the best round of each
// counts, so that a clock that changes meanwhile does not decide.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "ops/gemm_internal.h"

namespace capstan::ops {
namespace {

constexpr int kCandidates = 8, kRounds = 3, kRepeats = 8;

at::ScalarType scalar_type_of(LtType type) {
  constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kFloat8_e4m3fn,
                                       at::kFloat8_e5m2};
  return kTypes[static_cast<size_t>(type)];
}

// Rows of the matrix seen transposed, at the distance that it has; as far from a rounder address as
// the alignment says.
Tensor scratch_matrix(const LtMatrix& matrix, int64_t alignment) {
  const at::ScalarType type = scalar_type_of(matrix.type);
  const auto size = static_cast<int64_t>(at::elementSize(type));
  // Nothing computes in fp8.
  const auto made =
      at::TensorOptions().device(device::run_device()).dtype(size == 1 ? at::kBFloat16 : type);
  const int64_t ahead = alignment < 16 ? alignment / size : 0;
  const int64_t count = ahead + matrix.columns * matrix.leading;
  Tensor lines = at::empty({count / matrix.leading + 1, matrix.leading}, made);
  const Tensor row = at::arange(lines.size(0), made.dtype(at::kFloat)).mul_(0.7).sin_();
  const Tensor column = at::arange(matrix.leading, made.dtype(at::kFloat)).mul_(0.3).cos_();
  at::mul_out(lines, row.to(made.dtype()).unsqueeze(1), column.to(made.dtype()).unsqueeze(0));
  const Tensor numbers = lines.view({-1}).narrow(0, 0, count).to(type);
  return numbers.as_strided({matrix.columns, matrix.rows}, {matrix.leading, 1}, ahead);
}

Tensor turned(const Tensor& x, bool transposed) { return transposed ? x.t() : x; }

Tensor scratch_scale(LtScale scale, int64_t rows) {
  if (scale == LtScale::kNone) return {};
  const auto real = at::TensorOptions().device(device::run_device()).dtype(at::kFloat);
  return scale == LtScale::kRow ? at::ones({rows, 1}, real) : at::ones({1}, real);
}

Tensor scratch_vector(LtType type, int64_t count, int64_t alignment) {
  return scratch_matrix({type, count, 1, count}, alignment).view({-1});
}

// Instead of a fused product; `alone` is the choice for the product alone.
void run_in_parts(LtApi& api, const GemmChoice& alone, const Product& product) {
  if (alone.algorithm)
    run_algorithm(api, alone.problem, *alone.algorithm, plain_of(product));
  else
    multiply_by_libtorch(plain_of(product));
  finish(product);
}

// Microseconds of each; the first round loads kernels.
std::vector<double> best_of_turns(LtApi& api, const std::vector<std::function<void()>>& works) {
  const device::Stream stream = device::accelerator()->current_stream();
  std::vector<double> us(works.size(), std::numeric_limits<double>::infinity());
  for (int round = 0; round <= kRounds; ++round)
    for (size_t i = 0; i < works.size(); ++i) {
      const double taken = api.time_us(stream, kRepeats, works[i]);
      if (round > 0) us[i] = std::min(us[i], taken / kRepeats);
    }
  return us;
}

}  // namespace

Product scratch_product(const LtProblem& p) {
  Product product{.out_MN = scratch_matrix(p.d, p.alignment),
                  .a_MK = turned(scratch_matrix(p.b, p.alignment), p.b_transposed),
                  .b_KN = turned(scratch_matrix(p.a, p.alignment), p.a_transposed),
                  .accumulates = p.accumulates};
  product.a_scale = scratch_scale(p.scale, p.d.columns);
  product.b_scale = scratch_scale(p.scale, p.d.rows);
  if (p.epilogue == LtEpilogue::kBias || p.epilogue == LtEpilogue::kGeluBias)
    product.bias_N = scratch_vector(p.d.type, p.d.rows, p.alignment);
  if (p.epilogue == LtEpilogue::kGeluBias) product.sum_MN = scratch_matrix(p.d, p.alignment);
  if (p.epilogue == LtEpilogue::kGeluGradient)
    product.gelu_at_MN = scratch_matrix(p.d, p.alignment);
  if (p.epilogue == LtEpilogue::kBiasGradient)
    product.row_sums_M = scratch_vector(p.d.type, p.d.columns, p.alignment);
  return product;
}

GemmChoice fastest(LtApi& api, const LtProblem& problem, bool may_be_libtorch) {
  const at::NoGradGuard no_grad;
  const std::vector<LtAlgorithm> list = api.algorithms(problem, kCandidates, kLtWorkspaceBytes);
  GemmChoice choice{.problem = problem, .algorithm = std::nullopt};
  if (list.empty()) return choice;
  std::optional<GemmChoice> alone;
  if (is_fused(problem)) alone = fastest(api, plain_of(problem), may_be_libtorch);
  const bool has_rival = alone || (may_be_libtorch && has_libtorch_form(problem));
  const Product product = scratch_product(problem);
  std::vector<std::function<void()>> works;
  for (const LtAlgorithm& algorithm : list)
    works.emplace_back([&] { run_algorithm(api, problem, algorithm, product); });
  if (has_rival)
    works.emplace_back(
        [&] { alone ? run_in_parts(api, *alone, product) : multiply_by_libtorch(product); });
  std::vector<double> us = best_of_turns(api, works);
  if (has_rival) {
    choice.rival_us = us.back();
    us.pop_back();
  }
  const auto best = static_cast<size_t>(std::min_element(us.begin(), us.end()) - us.begin());
  choice.us = us[best];
  if (!has_rival || choice.us < choice.rival_us) choice.algorithm = list[best];
  return choice;
}

}  // namespace capstan::ops
