// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "capstan/ops/gemm.h"

namespace capstan::ops {

// What an algorithm may ask for: LibTorch's own limit on compute capability 9.0.
inline constexpr int64_t kLtWorkspaceBytes = int64_t{32} << 20;

void run_algorithm(LtApi& api, const LtProblem& problem, const LtAlgorithm& algorithm,
                   const Product& product);

// Of the library's candidates and their rival, see Gemm::measure; may_be_libtorch: where LibTorch
// may multiply.
[[nodiscard]] GemmChoice fastest(LtApi& api, const LtProblem& problem, bool may_be_libtorch);
// A product of the problem on scratch memory, with numbers between -1 and 1.
[[nodiscard]] Product scratch_product(const LtProblem& problem);

// Whether a product of factors of this type adds to an fp32 matrix: 16-bit ones on GPUs, bf16 on
// CPUs with AMX, none by the reference.
[[nodiscard]] bool adds_wide(c10::Device device, at::ScalarType type);
// Whether our kernels of CPUs with AMX have the product: bf16 factors, an fp32 result.
[[nodiscard]] bool is_for_tiles(const Product& product);
// Such a product.
void multiply_on_tiles(const Product& product);

}  // namespace capstan::ops
