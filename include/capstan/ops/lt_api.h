// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The cuBLASLt calls that products use, as an interface: the CUDA plug-in forwards them to the
// library, tests put a fake behind them. Types are our own, so no CUDA header is needed here.
// Matrices are column-major, as cuBLASLt's. Thread-safe.
#pragma once
#include <array>
#include <compare>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "capstan/device/accelerator.h"

namespace capstan::ops {

enum class LtType { kFp32, kBf16, kFp16, kE4m3, kE5m2 };
// Of fp8 factors: fp32 numbers that the product is multiplied with. kTensor: one per factor; kRow:
// one per row of op(A) and per column of op(B).
enum class LtScale { kNone, kTensor, kRow };

// What is done to the sum before it is rounded, or beside it. GELU is its approximation by tanh.
enum class LtEpilogue {
  kNone,
  kBias,          // + bias
  kGeluBias,      // gelu(sum + bias); aux receives the sum + bias
  kGeluGradient,  // sum * gelu'(aux)
  kBiasGradient,  // bias_gradient receives the sum of op(B) over the depth
};

// As it lies in memory: element (r, c) at r + c * leading.
struct LtMatrix {
  LtType type = LtType::kFp32;
  int64_t rows = 0, columns = 0, leading = 0;
  auto operator<=>(const LtMatrix&) const = default;  // NOLINT: no null here
};

// D = op(A) op(B) (+ D), epilogue, summed in fp32 and rounded once. Everything that decides which
// algorithms there are; what lies at the pointers does not. A bias is one number per row of D,
// added to each column; its gradient one per column. Both have the type of D, and aux is as D is,
// with a leading dimension that is a multiple of 8.
struct LtProblem {
  LtMatrix a, b, d;
  bool a_transposed = false, b_transposed = false;
  bool accumulates = false;  // beta 1 instead of 0
  LtEpilogue epilogue = LtEpilogue::kNone;
  LtScale scale = LtScale::kNone;
  int64_t alignment = 16;  // bytes: all that is read or written begins at a multiple, 2 to 16
  auto operator<=>(const LtProblem&) const = default;  // NOLINT: no null here

  [[nodiscard]] int64_t depth() const { return a_transposed ? a.rows : a.columns; }
};

// Device memory. d is read as well where the product accumulates.
struct LtPointers {
  const void *a = nullptr, *b = nullptr;
  void* d = nullptr;
  const void* bias = nullptr;
  void* aux = nullptr;  // written by kGeluBias, read by kGeluGradient
  void* bias_gradient = nullptr;
  const float *a_scale = nullptr, *b_scale = nullptr;
  void* workspace = nullptr;  // of the algorithm's size, at a multiple of 256 bytes
};

// Bytes of the library: good for one problem on one kind of GPU with one version (identity()).
struct LtAlgorithm {
  std::array<uint64_t, 8> bits{};
  int64_t workspace_bytes = 0;
  bool operator==(const LtAlgorithm&) const = default;
};

// Failures of the library are EnvErrors that name call and status.
class LtApi {
 public:
  virtual ~LtApi() = default;
  // One line: GPU, driver, version of the library.
  [[nodiscard]] virtual std::string identity() = 0;
  // At most `most` algorithms, the one that the library expects to be fastest first; none where it
  // has none for the problem. Partial sums are fp32.
  [[nodiscard]] virtual std::vector<LtAlgorithm> algorithms(const LtProblem& problem, int most,
                                                            int64_t workspace_bytes) = 0;
  // Whether the algorithm, read from a file, is one for the problem here.
  [[nodiscard]] virtual bool is_valid(const LtProblem& problem, const LtAlgorithm& algorithm) = 0;
  virtual void multiply(const LtProblem& problem, const LtPointers& pointers,
                        const LtAlgorithm& algorithm, device::Stream stream) = 0;
  // Device time of work() in microseconds, called `repeats` times: the host waits. Not in a
  // capture.
  [[nodiscard]] virtual double time_us(device::Stream stream, int repeats,
                                       const std::function<void()>& work) = 0;
};

// Null until a plug-in installed it.
[[nodiscard]] std::shared_ptr<LtApi> installed_lt_api();
void install_lt_api(std::shared_ptr<LtApi> api);

}  // namespace capstan::ops
