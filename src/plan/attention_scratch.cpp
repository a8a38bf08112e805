// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Read beside mha_bwd and mha_varlen_bwd of ATen's flash_api.cpp and _efficient_attention_backward
// of attention_backward.cu, and the calls in ops/attention_*.cpp.
#include "plan/attention_scratch_internal.h"

#include <algorithm>

#include "capstan/base/bytes.h"
#include "plan/memory_internal.h"

namespace capstan::plan {
namespace {

using Scratch = std::vector<ScratchTensor>;

int64_t times(int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
  return saturating_multiply(saturating_multiply(a, b), saturating_multiply(c, d));
}
int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t query_elements(const AttentionCall& c) {
  return times(c.samples, c.queries, c.heads, c.head_size);
}
// Of keys, or values.
int64_t key_elements(const AttentionCall& c, int64_t heads) {
  return times(c.samples, c.keys, heads, c.head_size);
}

// Results come in tensors of their own and are copied into the joined one.
void add_results(Scratch& list, const AttentionCall& c, int64_t key_heads, DType dtype) {
  list.push_back({"attention, gradient of query", query_elements(c), dtype});
  list.push_back({"attention, gradient of key", key_elements(c, key_heads), dtype});
  list.push_back({"attention, gradient of value", key_elements(c, key_heads), dtype});
}

// Of FlashAttention: gradients of queries are summed in fp32, in rows of whole blocks of 128
// queries and heads of whole blocks of features; in one order only where each of a few
// multiprocessors has sums of its own. Grouped heads have gradients of keys and values apart.
Scratch flash(const ActivationQuery& q, const AttentionCall& c) {
  constexpr int64_t kBlock = 128;
  const int64_t head = round_up(c.head_size, c.head_size <= 128 ? 32 : 64);
  const int64_t sequences = c.documents > 0 ? c.documents : c.samples;
  const int64_t rows = c.documents > 0 ? times(c.samples, c.queries) + times(kBlock, c.documents)
                                       : times(c.samples, round_up(c.queries, kBlock));
  const int64_t sums = std::max<int64_t>(
      1, ceil_divide(q.ordered_multiprocessors, std::max<int64_t>(1, times(sequences, c.heads))));
  Scratch list;
  for (const char* name : {"attention, part of the output", "attention, part of its gradient"})
    if (c.in_parts) list.push_back({name, query_elements(c), q.compute});
  add_results(list, c, c.key_heads, q.compute);
  list.push_back({"attention, products with the output", times(rows, c.heads), DType::kFp32});
  list.push_back({"attention, sums for queries", times(sums, rows, c.heads, head), DType::kFp32});
  if (c.key_heads == c.heads) return list;
  for (const char* of : {"key", "value"})
    list.push_back({std::string("attention, gradient of every head's ") + of,
                    key_elements(c, c.heads), q.compute});
  return list;
}

// Of the memory-efficient kernel in fp32: every head has keys and values of its own, and a buffer
// for the gradients of each block of queries, in documents for as many of them as the longest may
// have; before it is there, the product of output and gradient is.
Scratch efficient(const ActivationQuery& q, const AttentionCall& c) {
  constexpr int64_t kColumns = 64, kLock = 4, kRowStep = 32;
  const int64_t block = c.head_size <= 64 ? 64 : 128;
  const int64_t sequences = c.documents > 0 ? c.documents : c.samples;
  const int64_t tokens = times(c.samples, c.queries, c.heads);
  const int64_t buffer = times(ceil_divide(c.queries, block), ceil_divide(c.head_size, kColumns),
                               block * kColumns + kLock);
  Scratch list;
  if (c.in_parts)
    list.push_back({"attention, part of the output's gradient", query_elements(c), q.compute});
  if (c.key_heads != c.heads)
    for (const char* of : {"key", "value"})
      list.push_back(
          {std::string("attention, every head's ") + of, key_elements(c, c.heads), q.compute});
  add_results(list, c, c.heads, q.compute);
  list.push_back({"attention, log-sum-exp in rows",
                  times(sequences, c.heads, round_up(c.queries, kRowStep)), DType::kFp32});
  list.push_back({"attention, products with the output", tokens, DType::kFp32});
  const int64_t buffers = times(sequences, c.heads, buffer);
  if (buffers >= query_elements(c) + tokens)
    list.push_back({"attention, sums for queries", buffers, DType::kFp32});
  else
    list.push_back({"attention, output x gradient", query_elements(c) + tokens, DType::kFp32});
  return list;
}

// Of plain math: probabilities beside the four steps from them to the scores' gradient, and inputs
// with heads in front.
Scratch plain(const ActivationQuery& q, const AttentionCall& c) {
  const DType wide = q.compute == DType::kFp64 ? DType::kFp64 : DType::kFp32;
  const int64_t scores = times(c.samples, c.heads, c.queries, c.keys);
  Scratch list;
  for (const char* name : {"probabilities", "their gradient", "less their mean", "by probabilities",
                           "gradient of the scores"})
    list.push_back({std::string("attention, ") + name, scores, wide});
  for (const char* name : {"query", "gradient"})
    list.push_back({std::string("attention, heads of ") + name, query_elements(c), wide});
  for (const char* name : {"key", "value"})
    list.push_back({std::string("attention, heads of ") + name, key_elements(c, c.heads), wide});
  return list;
}

}  // namespace

AttentionKernel attention_kernel(const Plan& plan) {
  using Kernel = AttentionKernel;
  const ModelShape& shape = plan.model().shape;
  const DType compute = plan.precision.compute;
  const bool is_narrow = compute == DType::kBf16 || compute == DType::kFp16;
  if (!is_on_gpu(plan)) {
    if (compute != DType::kFp16) return Kernel::kOwn;
    const bool is_causal = !shape.sliding_window && plan.resolved.data.documents != "separate";
    return is_causal ? Kernel::kLibTorch : Kernel::kPlain;
  }
  if (compute == DType::kFp32 && shape.head_dim % 4 == 0) return Kernel::kEfficient;
  if (is_narrow && shape.head_dim % 8 == 0 && shape.head_dim <= 256) return Kernel::kFlash;
  return Kernel::kPlain;
}

bool has_plain_parts(const Plan& plan) {
  const auto& window = plan.model().shape.sliding_window;
  const bool is_ring = plan.grid.sizes().cp > 1 && plan.resolved.parallel.context.method == "ring";
  if (!is_ring || !is_on_gpu(plan)) return false;
  if (window && *window < plan.batch.sequence_length) return true;
  return plan.resolved.data.documents == "separate" && plan.precision.compute == DType::kFp32;
}

Scratch attention_scratch(const ActivationQuery& query, const AttentionCall& call) {
  switch (query.attention) {
    case AttentionKernel::kFlash:
      return flash(query, call);
    case AttentionKernel::kEfficient:
      return efficient(query, call);
    case AttentionKernel::kPlain:
      return plain(query, call);
    case AttentionKernel::kLibTorch: {
      Scratch list;
      add_results(list, call, call.key_heads, query.compute);
      return list;
    }
    case AttentionKernel::kOwn:
      break;
  }
  return {};
}

int64_t scratch_bytes(const ActivationQuery& query, const Scratch& scratch) {
  int64_t bytes = 0;
  for (const ScratchTensor& tensor : scratch)
    bytes += allocation_bytes(
        saturating_multiply(tensor.elements, static_cast<int64_t>(size_of(tensor.dtype))),
        query.on_gpu);
  return bytes;
}

}  // namespace capstan::plan
