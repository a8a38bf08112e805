// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Products of a device: by LibTorch's call, or by cuBLASLt with an algorithm that was chosen by
// measurement (run.gemm). Both sum in fp32 and round once; they differ in the order of the sums.
// Legend: M, N rows and columns of the result, K contracted.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "capstan/ops/lt_api.h"

namespace capstan::ops {

using at::Tensor;

// out = a b (+ out) (+ bias). out has rows of adjacent numbers; a and b are matrices or transposed
// ones. Types: factors alike in bf16 or fp16 with a result of the same type or fp32; fp8 (with
// scales, one of the factors e4m3) with bf16 or fp32. Others are LibTorch's alone.
// At most one of sum_MN, gelu_at_MN and row_sums_M is given: what else one pass over the product
// may give. GELU is its approximation by tanh.
struct Product {
  Tensor out_MN, a_MK, b_KN;
  bool accumulates = false;
  Tensor bias_N = {};      // of the type of out; not with accumulates, in fp8 not with fp32
  Tensor a_scale = {};     // fp8: what a is multiplied with, fp32 [1] or [M, 1]
  Tensor b_scale = {};     // and b, [1] or [N, 1]
  Tensor sum_MN = {};      // receives a b (+ bias) in the type of out; out is its GELU
  Tensor gelu_at_MN = {};  // out = a b times the derivative of GELU here; of the type of out
  Tensor row_sums_M = {};  // fp32: receives the sums of a over K; out is fp32
};
// The multiplication alone, into sum_MN where that is given.
[[nodiscard]] Product plain_of(const Product& product);

// The product as cuBLASLt sees it, which is that of the transposed matrices; nothing where it is no
// case for it: other types, no elements, a layout without adjacent numbers, sides or addresses of
// fp8 that are no multiples of 16.
[[nodiscard]] std::optional<LtProblem> lt_problem_of(const Product& product);
// Whether more than a product is done in one pass; its rival is the product alone and kernels
// behind it.
[[nodiscard]] bool is_fused(const LtProblem& problem);
// Of the product alone.
[[nodiscard]] LtProblem plain_of(const LtProblem& problem);
// Whether LibTorch has the product in one call: neither fused ones nor fp8 with an fp32 result.
[[nodiscard]] bool has_libtorch_form(const LtProblem& problem);
[[nodiscard]] double flops_of(const LtProblem& problem);
// "4096 x 6144 x 2048 bf16 -> fp32, accumulated": M x N x K.
[[nodiscard]] std::string shape_text(const LtProblem& problem);

// By the process's Gemm where it says so, else the product alone, by it or by LibTorch, and kernels
// for the rest. On the CPU always by LibTorch.
void multiply(const Product& product);
// By LibTorch; the product has a LibTorch form.
void multiply_by_libtorch(const Product& product);
// What is left to do once plain_of(product) was computed.
void finish(const Product& product);
// By cuBLASLt, where there is no LibTorch form: false where run.gemm or the library has none.
[[nodiscard]] bool multiply_by_lt(const Product& product);

// Made by measurement, or read.
struct GemmChoice {
  LtProblem problem;
  std::optional<LtAlgorithm> algorithm;  // none: its rival
  // Of the fastest algorithm and its rival: LibTorch or, of fused problems, the product alone with
  // kernels behind it. 0: not measured.
  double us = 0, rival_us = 0;
};
// One line per choice under a line that names what they were measured on.
[[nodiscard]] std::string text_of(const std::vector<GemmChoice>& choices,
                                  const std::string& identity);
// Choices of another identity are none. Throws ConfigError for anything but text_of's.
[[nodiscard]] std::vector<GemmChoice> parse_choices(const std::string& text,
                                                    const std::string& identity);

// kAuto: what was measured to be faster; before that the rival. kCublaslt: cuBLASLt wherever it has
// an algorithm, its first before a measurement.
enum class GemmLibrary { kAuto, kCublaslt };

// The choices of a process. Nothing is measured within a product: products of unknown problems are
// remembered, and who knows a good moment has them measured. Thread-safe.
class Gemm {
 public:
  Gemm(std::shared_ptr<LtApi> api, GemmLibrary library);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // The one that products of this process ask, while somebody keeps it. One library at a time.
  [[nodiscard]] static std::shared_ptr<Gemm> share(GemmLibrary library);
  [[nodiscard]] static std::shared_ptr<Gemm> shared();  // null: none

  // False: not by cuBLASLt.
  [[nodiscard]] bool multiply(const Product& product);
  // Problems that came without a choice, in an order of their own.
  [[nodiscard]] std::vector<LtProblem> unmeasured() const;
  // Times every candidate and its rival, where there is one and the library may be it, on scratch
  // memory of the problem's size; the host waits.
  [[nodiscard]] GemmChoice measure(const LtProblem& problem) const;
  // From here on. Algorithms that are not valid here and choices that were made for another library
  // are left out. Returns how many were kept.
  int64_t adopt(const std::vector<GemmChoice>& choices);
  // Problems that come without a choice from here on are named once in the log.
  void close();
  [[nodiscard]] std::vector<GemmChoice> choices() const;
  [[nodiscard]] std::string identity() const { return api_->identity(); }

 private:
  [[nodiscard]] bool answers(const GemmChoice& choice) const;
  void note(const LtProblem& problem);  // unless there is a choice
  [[nodiscard]] std::optional<LtAlgorithm> algorithm_of(const LtProblem& problem);
  [[nodiscard]] std::optional<LtAlgorithm> first_algorithm(const LtProblem& problem);

  const std::shared_ptr<LtApi> api_;
  const GemmLibrary library_;
  mutable std::mutex mutex_;
  std::map<LtProblem, GemmChoice> choices_;
  std::map<LtProblem, std::optional<LtAlgorithm>> firsts_;  // of unmeasured problems
  std::set<LtProblem> unmeasured_;
  bool is_closed_ = false;
};

}  // namespace capstan::ops
