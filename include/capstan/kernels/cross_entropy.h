// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Softmax cross entropy on rows of logits. Legend: N rows, V columns held here, T logits dtype, A
// fp64 for fp64, else fp32. Targets are global ids; -100 is ignored. Matches src/ops/logits.cpp.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

inline constexpr int64_t kIgnoredTarget = -100;

struct LogitRows {
  DType dtype = DType::kBf16;
  void* logits = nullptr;  // T [N, row_stride], V columns used
  int64_t rows = 0, columns = 0, row_stride = 0;
  int64_t first_column = 0;          // global id of column 0
  const int64_t* targets = nullptr;  // [N]
};

// The whole vocabulary in one call: logprob = log p(target), 0 where ignored; with weights the
// logits become weight x (softmax - one_hot(target)), 0 where ignored. Bytes per logit: T read;
// with weights 2T read (the second time mostly from the cache), T written.
struct CrossEntropyArgs {
  LogitRows logits;
  const void* weights = nullptr;  // A [N], or null
  void* logprob = nullptr;        // A [N]
};
void cross_entropy(const CrossEntropyArgs& args, Stream stream);

// A vocabulary cut over ranks: stats, maximum of top over ranks, rescale_sums, sum of sum and
// picked over ranks, finish_stats, gradient.
struct LogitStatsArgs {
  LogitRows logits;
  void* top = nullptr;     // A [N]: largest logit; -inf without columns
  void* sum = nullptr;     // A [N]: of exp(logit - top)
  void* picked = nullptr;  // A [N]: logit of the target, 0 when it is not held here
};
void logit_stats(const LogitStatsArgs& args, Stream stream);  // T read per logit

struct RescaleSumsArgs {
  DType dtype = DType::kFp32;  // A
  int64_t rows = 0;
  const void* local_top = nullptr;
  const void* top = nullptr;
  void* sum = nullptr;  // sum exp(local_top - top), 0 stays 0
};
void rescale_sums(const RescaleSumsArgs& args, Stream stream);

struct FinishStatsArgs {
  DType dtype = DType::kFp32;  // A
  int64_t rows = 0;
  const void* top = nullptr;
  const void* sum = nullptr;
  const void* picked = nullptr;
  const int64_t* targets = nullptr;
  void* lse = nullptr;      // top + log(sum)
  void* logprob = nullptr;  // picked - lse, 0 where ignored
};
void finish_stats(const FinishStatsArgs& args, Stream stream);

struct LogitGradientArgs {
  LogitRows logits;
  const void* lse = nullptr;      // A [N]
  const void* weights = nullptr;  // A [N]
};
void logit_gradient(const LogitGradientArgs& args, Stream stream);  // T read, T written per logit

}  // namespace capstan::kernels
