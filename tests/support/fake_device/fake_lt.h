// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// cuBLASLt on the fake device: refuses what the library refuses or would compute wrongly with
// (shapes, leading dimensions, types, layouts of fp8, epilogues, alignment, scales, workspace, an
// algorithm of another problem), computes from the definition, and tells times that a test chose.
#pragma once
#include <array>
#include <atomic>
#include <functional>

#include "capstan/ops/gemm.h"

namespace capstan::test {

struct FakeLtOptions {
  std::string identity = "fake device, cuBLASLt 0";
  int algorithms = 3;  // of a problem; they sum in different orders
  std::function<bool(const ops::LtProblem&)> has_algorithms = {};  // none: all
  // What time_us tells of algorithms: a fused one is faster than the product alone. Kernels behind
  // a product take no time.
  std::function<double(const ops::LtProblem&, int algorithm)> us = [](const auto& problem,
                                                                      int algorithm) {
    return 10.0 - algorithm - (ops::is_fused(problem) ? 0.5 : 0.0);
  };
  double libtorch_us = 9;
};

class FakeLt final : public ops::LtApi {
 public:
  explicit FakeLt(FakeLtOptions options = {}) : options_(std::move(options)) {}

  [[nodiscard]] std::string identity() override { return options_.identity; }
  [[nodiscard]] std::vector<ops::LtAlgorithm> algorithms(const ops::LtProblem& problem, int most,
                                                         int64_t workspace_bytes) override;
  [[nodiscard]] bool is_valid(const ops::LtProblem& problem,
                              const ops::LtAlgorithm& algorithm) override;
  void multiply(const ops::LtProblem& problem, const ops::LtPointers& pointers,
                const ops::LtAlgorithm& algorithm, device::Stream stream) override;
  [[nodiscard]] double time_us(device::Stream stream, int repeats,
                               const std::function<void()>& work) override;

  [[nodiscard]] int64_t products() const { return products_; }  // outside of time_us
  [[nodiscard]] int64_t products(ops::LtEpilogue epilogue) const {
    return by_epilogue_[static_cast<size_t>(epilogue)];
  }
  [[nodiscard]] int64_t timed() const { return timed_; }            // calls of time_us
  [[nodiscard]] int64_t searches() const { return searches_; }      // calls of algorithms
  [[nodiscard]] int last_algorithm() const { return last_index_; }  // of multiply

 private:
  [[nodiscard]] static int index_of(const ops::LtAlgorithm& algorithm);

  FakeLtOptions options_;
  std::atomic<int64_t> products_ = 0, timed_ = 0, searches_ = 0;
  std::array<std::atomic<int64_t>, 5> by_epilogue_{};
  std::atomic<int> last_index_ = -1;
};

}  // namespace capstan::test
