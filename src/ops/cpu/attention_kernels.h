// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Kernels of attention. s = scale q k^T; p = softmax(s); o = p v. Backward makes p again from the
// log-sum-exp: ds = p (do v^T - sum(do o)) scale; dq = ds k; dk = ds^T q; dv = p^T do. A task is
// one (sample, key/value head, split): it packs its keys and values once and walks blocks of
// queries, multiplying only the keys that a block can see.
#pragma once
#include <cstdint>

namespace capstan::ops::cpu {

// A [B, tokens, heads, H] tensor; strides in elements, H contiguous.
struct HeadsView {
  void* data = nullptr;
  int64_t sample = 0, token = 0, head = 0;
};

struct AttentionArgs {
  HeadsView q, k, v, out;
  HeadsView grad, dq, dk, dv;  // backward
  void* lse;                   // [B, N, T], fp32 (fp64 for fp64)
  int64_t samples, queries, keys, query_heads, key_heads, head_size;
  double scale;
  const int32_t* first_key;  // [B, T] or null
  int64_t window;            // 0 = none
  int64_t query_offset;
  int64_t splits;  // tasks per (sample, key head): blocks of queries are dealt out to them
  void* partial;   // backward with splits > 1: [tasks, 2, partial_elements]
};

struct AttentionSizes {                       // in computing scalars
  int64_t forward_scratch, backward_scratch;  // per thread
  int64_t partial_elements;                   // of dk or dv of one task
};

struct AttentionKernels {  // indexed by Element; scratch belongs to the calling thread
  using Kernel = void (*)(const AttentionArgs&, int64_t task_begin, int64_t task_end,
                          void* scratch);
  AttentionSizes (*sizes[3])(const AttentionArgs&);
  Kernel forward[3], backward[3];
  Kernel sum_partials[3];  // tasks are (sample, key head)
};
inline constexpr int64_t kQueryBlock = 48;

extern const AttentionKernels attention_plain, attention_avx2, attention_avx512,
    attention_avx512bf16, attention_amx;
[[nodiscard]] const AttentionKernels& attention_kernels();

}  // namespace capstan::ops::cpu
