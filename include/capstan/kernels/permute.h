// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Tokens into the order of their experts and back. Legend: N tokens, k choices of a token, slot =
// token x k + choice, E experts (at most 1024), R rows (slots that were kept), D features, T dtype,
// A fp64 for fp64, else fp32. Matches src/ops/permute.cpp.
#pragma once
#include <cstddef>

#include "capstan/kernels/stream.h"

namespace capstan::kernels {

// Kept slots sorted by expert, within an expert by slot: a counting sort over chunks in fixed
// order.
struct ExpertOrderArgs {
  int64_t slots = 0, experts = 0;
  const int64_t* chosen = nullptr;  // [N k]
  const uint8_t* keep = nullptr;    // [N k], or null: all
  int64_t* place = nullptr;         // [N k]: row of each slot; -1 where it was dropped
  int64_t* slot = nullptr;          // [R]: slot of each row, or null
  int64_t* counts = nullptr;        // [E]: rows of each expert
  int* workspace = nullptr;         // expert_order_workspace_bytes()
};
void expert_order(const ExpertOrderArgs& args, Stream stream);
[[nodiscard]] size_t expert_order_workspace_bytes(int64_t slots, int64_t experts);

struct PermuteShape {
  DType dtype = DType::kBf16;  // T
  int64_t tokens = 0, per_token = 1, width = 0;
  const int64_t* place = nullptr;  // [N, k]
};

// rows[place[n, j]] = x[n]. Bytes per element of a row: T read (once per token from memory), T
// written.
struct PermuteTokensArgs {
  PermuteShape shape;
  const void* x = nullptr;  // T [N, D]
  void* rows = nullptr;     // T [R, D]
};
void permute_tokens(const PermuteTokensArgs& args, Stream stream);

// out[n] = sum over j, in order, of weights[n, j] rows[place[n, j]]; without weights the backward
// of permute_tokens. Bytes per element of a row: T read; per element of out: T written.
struct CombineRowsArgs {
  PermuteShape shape;
  const void* rows = nullptr;     // T [R, D]
  const void* weights = nullptr;  // A [N, k], or null: ones
  void* out = nullptr;            // T [N, D]
};
void combine_rows(const CombineRowsArgs& args, Stream stream);

// Backward of combine_rows: d_rows[r] = weight x grad[token], d_weight = grad[token] . rows[r], 0
// where dropped. Bytes per element of a row: 2T read, T written.
struct CombineRowsBackwardArgs {
  PermuteShape shape;
  const void* grad = nullptr;     // T [N, D]
  const void* rows = nullptr;     // T [R, D]
  const void* weights = nullptr;  // A [N, k]
  void* d_rows = nullptr;         // T [R, D]
  void* d_weights = nullptr;      // A [N, k]
};
void combine_rows_backward(const CombineRowsBackwardArgs& args, Stream stream);

}  // namespace capstan::kernels
