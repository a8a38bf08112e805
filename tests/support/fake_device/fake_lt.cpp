// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/fake_lt.h"

#include <ATen/ATen.h>

#include <cmath>
#include <numbers>

#include "support/fake_device/capture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/memory.h"
#include "support/fake_device/timeline.h"

namespace capstan::test {
namespace {

using at::Tensor;
using ops::LtAlgorithm;
using ops::LtEpilogue;
using ops::LtMatrix;
using ops::LtPointers;
using ops::LtProblem;
using ops::LtScale;
using ops::LtType;

constexpr int64_t kWorkspaceStep = 512, kWorkspaceAlignment = 256, kSide = 16, kAuxStep = 8;
thread_local double* timed_product_us = nullptr;

at::ScalarType scalar_type(LtType type) {
  constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kFloat8_e4m3fn,
                                       at::kFloat8_e5m2};
  return kTypes[static_cast<size_t>(type)];
}
int64_t size_of(LtType type) { return static_cast<int64_t>(at::elementSize(scalar_type(type))); }
bool is_fp8(LtType type) { return type == LtType::kE4m3 || type == LtType::kE5m2; }

void check_shapes(const LtProblem& p) {
  for (const LtMatrix& m : {p.a, p.b, p.d})
    TORCH_CHECK(m.rows > 0 && m.columns > 0 && m.leading >= m.rows,
                "cublasLtMatrixLayoutCreate: ", m.rows, " x ", m.columns, ", leading ", m.leading);
  const int64_t rows = p.a_transposed ? p.a.columns : p.a.rows,
                columns = p.b_transposed ? p.b.rows : p.b.columns,
                depth = p.b_transposed ? p.b.columns : p.b.rows;
  TORCH_CHECK(rows == p.d.rows && columns == p.d.columns && depth == p.depth(),
              "cublasLtMatmul: op(A) ", rows, " x ", p.depth(), ", op(B) ", depth, " x ", columns,
              ", D ", p.d.rows, " x ", p.d.columns);
}

void check_types(const LtProblem& p) {
  const bool narrow = p.a.type == LtType::kBf16 || p.a.type == LtType::kFp16;
  if (p.scale == LtScale::kNone) {
    TORCH_CHECK(
        narrow && p.b.type == p.a.type && (p.d.type == p.a.type || p.d.type == LtType::kFp32),
        "cublasLtMatmul: no kernels for these types");
    return;
  }
  TORCH_CHECK(is_fp8(p.a.type) && is_fp8(p.b.type) &&
                  (p.a.type == LtType::kE4m3 || p.b.type == LtType::kE4m3) &&
                  (p.d.type == LtType::kBf16 || p.d.type == LtType::kFp32),
              "cublasLtMatmul: no fp8 kernels for these types");
  TORCH_CHECK(p.a_transposed && !p.b_transposed, "cublasLtMatmul: fp8 is TN only");
  for (const int64_t side : {p.d.rows, p.d.columns, p.depth(), p.a.leading, p.b.leading})
    TORCH_CHECK(side % kSide == 0, "cublasLtMatmul: a side of ", side, " in fp8");
  TORCH_CHECK(p.alignment == kSide, "cublasLtMatmul: fp8 alignment");
}

bool has_bias(const LtProblem& p) {
  return p.epilogue == LtEpilogue::kBias || p.epilogue == LtEpilogue::kGeluBias;
}
bool has_aux(const LtProblem& p) {
  return p.epilogue == LtEpilogue::kGeluBias || p.epilogue == LtEpilogue::kGeluGradient;
}

// Documented: aux of D's type with a leading dimension of a multiple of 8, bias gradients of D's
// type. In fp8 a bias on bf16 alone.
void check_epilogue(const LtProblem& p) {
  if (p.epilogue == LtEpilogue::kNone) return;
  if (p.scale != LtScale::kNone)
    TORCH_CHECK(p.epilogue == LtEpilogue::kBias && p.d.type == LtType::kBf16,
                "cublasLtMatmul: no fp8 kernels with this epilogue");
  if (!has_aux(p)) return;
  TORCH_CHECK(p.d.type != LtType::kFp32 && p.d.leading % kAuxStep == 0 && p.alignment == kSide,
              "cublasLtMatmul: aux of leading ", p.d.leading, ", alignment ", p.alignment);
}

void check_problem(const LtProblem& p) {
  check_shapes(p);
  check_types(p);
  TORCH_CHECK(p.alignment == 2 || p.alignment == 4 || p.alignment == 8 || p.alignment == 16,
              "cublasLtMatmul: alignment ", p.alignment);
  check_epilogue(p);
  TORCH_CHECK(!p.accumulates || !(has_bias(p) || has_aux(p)),
              "an epilogue of the product would be one of D as well");
}

uint64_t hash_of(const LtProblem& p) {
  uint64_t hash = 17;
  const auto add = [&](int64_t n) { hash = hash * 1000003 + static_cast<uint64_t>(n); };
  for (const LtMatrix& m : {p.a, p.b, p.d})
    for (const int64_t n : {static_cast<int64_t>(m.type), m.rows, m.columns, m.leading}) add(n);
  for (const bool flag : {p.a_transposed, p.b_transposed, p.accumulates}) add(flag);
  add(static_cast<int64_t>(p.epilogue));
  add(static_cast<int64_t>(p.scale));
  add(p.alignment);
  return hash;
}

void check_address(const void* pointer, int64_t alignment, const char* what) {
  TORCH_CHECK(pointer && fake::is_device_pointer(pointer), what, " is no device memory");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0, what,
              " does not begin at a multiple of ", alignment);
}

void check_pointers(const LtProblem& p, const LtPointers& at, const LtAlgorithm& algorithm) {
  check_address(at.a, p.alignment, "A");
  check_address(at.b, p.alignment, "B");
  check_address(at.d, p.alignment, "D");
  const bool sums = p.epilogue == LtEpilogue::kBiasGradient;
  TORCH_CHECK(has_bias(p) == (at.bias != nullptr) && has_aux(p) == (at.aux != nullptr) &&
                  sums == (at.bias_gradient != nullptr),
              "cublasLtMatmul: pointers of another epilogue");
  for (const void* pointer :
       {at.bias, static_cast<const void*>(at.aux), static_cast<const void*>(at.bias_gradient)})
    if (pointer) check_address(pointer, p.alignment, "a bias or aux");
  const bool has_scales = p.scale != LtScale::kNone;
  TORCH_CHECK((at.a_scale != nullptr) == has_scales && (at.b_scale != nullptr) == has_scales,
              "cublasLtMatmul: scales of fp8");
  if (has_scales) check_address(at.a_scale, size_of(LtType::kFp32), "scale of A");
  if (has_scales) check_address(at.b_scale, size_of(LtType::kFp32), "scale of B");
  if (algorithm.workspace_bytes > 0) check_address(at.workspace, kWorkspaceAlignment, "workspace");
}

LtMatrix vector(const LtProblem& p, int64_t count) { return {p.d.type, count, 1, count}; }

void note(const void* pointer, const LtMatrix& m, bool is_write, const fake::Access& now) {
  const int64_t size = size_of(m.type);
  const auto* const first = static_cast<const char*>(pointer);
  const bool is_whole = m.leading == m.rows;
  for (int64_t c = 0; c < (is_whole ? 1 : m.columns); ++c)
    fake::note(first + c * m.leading * size,
               static_cast<size_t>(m.rows * size * (is_whole ? m.columns : 1)), is_write, now);
}

// The memory as a tensor of rows x columns.
Tensor matrix(const void* pointer, const LtMatrix& m) {
  return at::from_blob(host_of(const_cast<void*>(pointer)), {m.rows, m.columns}, {1, m.leading},
                       at::TensorOptions().dtype(scalar_type(m.type)));
}

Tensor factor(const void* pointer, const LtMatrix& m, bool transposed) {
  const Tensor x = matrix(pointer, m).to(at::kFloat);
  return transposed ? x.t() : x;
}

Tensor scale(const float* pointer, LtScale kind, int64_t count) {
  const int64_t numbers = kind == LtScale::kRow ? count : 1;
  return at::from_blob(host_of(const_cast<float*>(pointer)), {numbers},
                       at::TensorOptions().dtype(at::kFloat));
}

// Parts of the depth one after another, as many as the algorithm says.
Tensor summed(const Tensor& a, const Tensor& b, int parts) {
  const int64_t depth = a.size(1), part = (depth + parts - 1) / parts;
  Tensor sum = at::zeros({a.size(0), b.size(1)}, at::kFloat);
  for (int64_t k = 0; k < depth; k += part) {
    const int64_t count = std::min(part, depth - k);
    sum.add_(at::mm(a.narrow(1, k, count), b.narrow(0, k, count)));
  }
  return sum;
}

// What the epilogue makes of the sum.
Tensor behind(const LtProblem& p, const LtPointers& at, const Tensor& sum) {
  const double root = std::sqrt(2 / std::numbers::pi), cube = 0.044715;
  const auto inner = [&](const Tensor& x) { return root * (x + cube * x.pow(3)); };
  if (p.epilogue == LtEpilogue::kGeluBias) return 0.5 * sum * (1 + at::tanh(inner(sum)));
  if (p.epilogue != LtEpilogue::kGeluGradient) return sum;
  const Tensor x = matrix(at.aux, p.d).to(at::kFloat), t = at::tanh(inner(x));
  return sum * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * cube * x * x));
}

void compute(const LtProblem& p, const LtPointers& at, int parts) {
  Tensor sum = summed(factor(at.a, p.a, p.a_transposed), factor(at.b, p.b, p.b_transposed), parts);
  if (p.scale != LtScale::kNone) {
    sum.mul_(scale(at.a_scale, p.scale, p.d.rows).unsqueeze(1));
    sum.mul_(scale(at.b_scale, p.scale, p.d.columns).unsqueeze(0));
  }
  Tensor out = matrix(at.d, p.d);
  if (p.accumulates) sum.add_(out);
  if (has_bias(p)) sum.add_(matrix(at.bias, vector(p, p.d.rows)));
  if (p.epilogue == LtEpilogue::kGeluBias) matrix(at.aux, p.d).copy_(sum);
  out.copy_(behind(p, at, sum));
  if (p.epilogue == LtEpilogue::kBiasGradient)
    matrix(at.bias_gradient, vector(p, p.d.columns))
        .copy_(factor(at.b, p.b, p.b_transposed).sum(0).unsqueeze(1));
}

}  // namespace

int FakeLt::index_of(const LtAlgorithm& algorithm) { return static_cast<int>(algorithm.bits[1]); }

std::vector<LtAlgorithm> FakeLt::algorithms(const LtProblem& problem, int most,
                                            int64_t workspace_bytes) {
  check_problem(problem);
  ++searches_;
  std::vector<LtAlgorithm> list;
  if (options_.has_algorithms && !options_.has_algorithms(problem)) return list;
  for (int i = 0; i < std::min(most, options_.algorithms); ++i) {
    TORCH_CHECK(i * kWorkspaceStep <= workspace_bytes, "a small workspace");
    list.push_back({{hash_of(problem), static_cast<uint64_t>(i)}, i * kWorkspaceStep});
  }
  return list;
}

bool FakeLt::is_valid(const LtProblem& problem, const LtAlgorithm& algorithm) {
  check_problem(problem);
  const int index = index_of(algorithm);
  return algorithm.bits[0] == hash_of(problem) && index >= 0 && index < options_.algorithms &&
         algorithm.workspace_bytes == index * kWorkspaceStep;
}

void FakeLt::multiply(const LtProblem& problem, const LtPointers& pointers,
                      const LtAlgorithm& algorithm, device::Stream stream) {
  TORCH_CHECK(is_valid(problem, algorithm), "cublasLtMatmul: an algorithm of another problem");
  check_pointers(problem, pointers, algorithm);
  TORCH_CHECK(stream.handle == install_fake_device().current_stream().handle,
              "a product on another stream");
  const int index = index_of(algorithm);
  const auto run = [problem, pointers, index] {
    const fake::Access now = fake::begin_op("cublasLtMatmul");
    note(pointers.a, problem.a, false, now);
    note(pointers.b, problem.b, false, now);
    note(pointers.d, problem.d, true, now);
    if (pointers.aux) note(pointers.aux, problem.d, problem.epilogue == LtEpilogue::kGeluBias, now);
    if (pointers.bias) note(pointers.bias, vector(problem, problem.d.rows), false, now);
    if (pointers.bias_gradient)
      note(pointers.bias_gradient, vector(problem, problem.d.columns), true, now);
    compute(problem, pointers, index + 1);
  };
  record_for_graph(run);
  run();
  last_index_ = index;
  if (timed_product_us) {
    *timed_product_us += options_.us(problem, index);
    return;
  }
  ++products_;
  ++by_epilogue_[static_cast<size_t>(problem.epilogue)];
}

double FakeLt::time_us(device::Stream, int repeats, const std::function<void()>& work) {
  TORCH_CHECK(!fake::is_capturing(), "a measurement in a capture");
  ++timed_;
  double us = 0;
  timed_product_us = &us;
  for (int i = 0; i < repeats; ++i) work();
  timed_product_us = nullptr;
  fake::count_host_sync("time_us");
  return us > 0 ? us : repeats * options_.libtorch_us;
}

}  // namespace capstan::test
