// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernels of the cross entropy: serial functions on ranges of rows of logits. top = max l; sum =
// sum exp(l - top); gradient = w (exp(l - lse) - one_hot). The fused one does both while a row is
// in cache: it reads a row once from memory and writes it once.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

// Statistics are fp32 (fp64 for fp64 logits), targets int64 and global.
struct CrossEntropyArgs {
  void* logits;
  int64_t row_stride, columns;
  int64_t first_column;  // global number of column 0
  const int64_t* targets;
  const void* weights;       // gradient, fused
  const void* lse;           // gradient
  void *top, *sum, *picked;  // stats
  void* logprob;             // fused
};

struct CrossEntropyKernels {  // indexed by Element
  using Kernel = void (*)(const CrossEntropyArgs&, int64_t row_begin, int64_t row_end);
  Kernel stats[3], gradient[3];
  Kernel fused[3];  // logits -> gradient and logprob, all columns local; weights null: logprob only
};

inline constexpr int64_t kIgnored = -100;

extern const CrossEntropyKernels cross_entropy_plain, cross_entropy_avx2, cross_entropy_avx512,
    cross_entropy_avx512bf16;
[[nodiscard]] const CrossEntropyKernels& cross_entropy_kernels();

}  // namespace capstan::ops::cpu
