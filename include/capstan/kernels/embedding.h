// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Embedding lookup and its gradient. Legend: N tokens, V table rows held here, D features. Ids are
// global; rows that are not held give 0 and get nothing. Matches src/ops/embedding.cpp.
#pragma once
#include <cstddef>

#include "capstan/kernels/stream.h"

namespace capstan::kernels {

struct EmbeddingShape {
  int64_t tokens = 0, width = 0;
  int64_t first_row = 0, rows = 0;  // of the table
};

// out[n] = table[ids[n]]. Bytes per element: table read (once per use), out written.
struct EmbeddingForwardArgs {
  DType table_dtype = DType::kBf16, out_dtype = DType::kFp32;
  EmbeddingShape shape;
  const void* table = nullptr;   // [V, D]
  const int64_t* ids = nullptr;  // [N]
  void* out = nullptr;           // [N, D]
};
void embedding_forward(const EmbeddingForwardArgs& args, Stream stream);

// buffer[ids[n]] += grad[n], added in the order of the tokens, in at least fp32. Without sorting
// and without atomics on floating-point numbers: tokens are grouped by row within chunks, and the
// groups of a row are linked. Bytes per element: grad read; buffer read and written for rows in
// use.
struct EmbeddingBackwardArgs {
  DType grad_dtype = DType::kBf16, buffer_dtype = DType::kFp32;
  EmbeddingShape shape;
  const void* grad = nullptr;    // [N, D]
  const int64_t* ids = nullptr;  // [N]
  void* buffer = nullptr;        // [V, D]
  void* workspace = nullptr;     // embedding_workspace_bytes(shape), on a multiple of 16 bytes
};
void embedding_backward(const EmbeddingBackwardArgs& args, Stream stream);
[[nodiscard]] size_t embedding_workspace_bytes(const EmbeddingShape& shape);

}  // namespace capstan::kernels
