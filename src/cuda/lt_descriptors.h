// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Descriptors of cuBLASLt for one product. They need no GPU.
#pragma once
#include <cublasLt.h>

#include "capstan/ops/lt_api.h"

namespace capstan::cuda {

// Throws EnvError naming the call.
void check_lt(cublasStatus_t status, const char* call);

// Without pointers: what is asked of the heuristic. With them: what is multiplied.
class LtDescriptors {
 public:
  explicit LtDescriptors(const ops::LtProblem& problem, const ops::LtPointers* pointers = nullptr);
  ~LtDescriptors();
  LtDescriptors(const LtDescriptors&) = delete;
  LtDescriptors& operator=(const LtDescriptors&) = delete;

  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;

 private:
  void make(const ops::LtProblem& problem, const ops::LtPointers* pointers);
  void release();
};

class LtPreference {
 public:
  LtPreference(const ops::LtProblem& problem, int64_t workspace_bytes);
  ~LtPreference();
  LtPreference(const LtPreference&) = delete;
  LtPreference& operator=(const LtPreference&) = delete;

  cublasLtMatmulPreference_t handle = nullptr;
};

}  // namespace capstan::cuda
