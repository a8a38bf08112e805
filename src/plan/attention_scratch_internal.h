// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the kernels of attention take in the backward beside the tensors that every form has
// (inputs, output, log-sum-exp, the output's gradient and the joined gradient of query, key and
// value), as LibTorch 2.11 allocates it. Their forwards take less of the same kinds, when less is
// saved.
#pragma once
#include <string>
#include <vector>

#include "capstan/plan/plan.h"

namespace capstan::plan {

// One call; heads are those of the call, tokens those of one sample.
struct AttentionCall {
  int64_t samples = 0, queries = 0, keys = 0;
  int64_t heads = 0, key_heads = 0, head_size = 0;
  int64_t documents = 0;  // 0: rows
  // Gradient and output are parts of the rows of several samples, which kernels take as copies.
  bool in_parts = false;
};

struct ScratchTensor {
  std::string name;
  int64_t elements = 0;
  DType dtype = DType::kFp32;
};
[[nodiscard]] std::vector<ScratchTensor> attention_scratch(const ActivationQuery& query,
                                                           const AttentionCall& call);

// The kernel of rows, and of the parts of a ring that it takes.
[[nodiscard]] AttentionKernel attention_kernel(const Plan& plan);
// Whether a ring has parts for which plain math is left, as ops::choose_attention has it.
[[nodiscard]] bool has_plain_parts(const Plan& plan);

// Bytes of the list, each tensor as it is allocated.
[[nodiscard]] int64_t scratch_bytes(const ActivationQuery& query,
                                    const std::vector<ScratchTensor>& scratch);

}  // namespace capstan::plan
