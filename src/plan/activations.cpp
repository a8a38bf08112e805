// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What one pass of the llama family keeps and needs, tensor by tensor. The table is meant to be
// read beside the layers in nn: a tensor saved there is a line here. Widths are elements per token.
#include <algorithm>
#include <bit>
#include <map>

#include "plan/llama_internal.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {
namespace {

using Part = ActivationTerm::Part;

struct Widths {
  int64_t hidden, ffn, query, key_value, heads, vocab;
};

struct TermTable {
  const ActivationQuery& query;
  std::vector<ActivationTerm> terms;
  int phase = 0;

  void add(Part part, const char* name, int64_t elements, DType dtype) {
    const int64_t bytes = saturating_multiply(elements, static_cast<int64_t>(size_of(dtype)));
    if (bytes > 0) terms.push_back({part, phase, name, allocation_bytes(bytes)});
  }
  void per_token(Part part, const char* name, int64_t width, DType dtype) {
    add(part, name, saturating_multiply(query.tokens, width), dtype);
  }
  // Saved by the layer and no longer needed in this phase.
  void release(Part part, const char* name, int64_t width, DType dtype) {
    const size_t before = terms.size();
    per_token(part, name, width, dtype);
    if (terms.size() > before) terms.back().bytes = -terms.back().bytes;
  }
};

// Statistics of norms and softmax: fp32, or fp64 in fp64 runs.
DType statistics_dtype(DType compute) {
  return compute == DType::kFp64 ? DType::kFp64 : DType::kFp32;
}

void add_saved_by_layer(TermTable& t, const Widths& w, const ActivationQuery& q) {
  const DType compute = q.compute, residual = q.residual, statistics = statistics_dtype(compute);
  t.per_token(Part::kLayer, "residual at the attention norm", w.hidden, residual);
  t.per_token(Part::kLayer, "attention norm, scale", 1, statistics);
  t.per_token(Part::kLayer, "attention norm, output", w.hidden, compute);
  t.per_token(Part::kLayer, "query, key, value after RoPE", w.query + 2 * w.key_value, compute);
  t.per_token(Part::kLayer, "attention output", w.query, compute);
  t.per_token(Part::kLayer, "attention log-sum-exp", w.heads, statistics);
  t.per_token(Part::kLayer, "residual at the feed-forward norm", w.hidden, residual);
  t.per_token(Part::kLayer, "feed-forward norm, scale", 1, statistics);
  t.per_token(Part::kLayer, "feed-forward norm, output", w.hidden, compute);
  t.per_token(Part::kLayer, "gate and up", 2 * w.ffn, compute);
  t.per_token(Part::kLayer, "gate x up", w.ffn, compute);
  t.per_token(Part::kLayer, "layer output, not yet added", w.hidden, compute);
}

// The backward of a layer begins with the feed-forward part; whatever comes later has more free
// again. The layer's output went away when its gradient was made. Weight gradients of another type
// than the buffer's are made apart, then added.
void add_layer_workspace(TermTable& t, const Widths& w, const ActivationQuery& q) {
  constexpr Part kPart = Part::kLayerWorkspace;
  const bool adds_apart = q.compute != q.gradients;
  const auto begin = [&](int phase, bool needs_output_gradient) {
    t.phase = phase;
    t.per_token(kPart, "gradient of the residual", w.hidden, q.residual);
    t.release(kPart, "layer output, free", w.hidden, q.compute);
    if (needs_output_gradient && q.compute != q.residual)  // else the two are one tensor
      t.per_token(kPart, "gradient of the layer output", w.hidden, q.compute);
  };
  begin(0, true);  // down projection, weight
  if (adds_apart) t.add(kPart, "gradient of down, to be added", w.ffn * w.hidden, q.compute);
  begin(1, true);  // down projection, input
  t.per_token(kPart, "gradient of gate x up", w.ffn, q.compute);
  begin(2, false);  // gate x up
  t.release(kPart, "gate x up, free", w.ffn, q.compute);
  t.per_token(kPart, "gradient of gate x up", w.ffn, q.compute);
  t.per_token(kPart, "gradient of gate and up", 2 * w.ffn, q.compute);
  begin(3, false);  // gate and up projections, weight
  t.release(kPart, "gate x up, free", w.ffn, q.compute);
  if (adds_apart)
    t.add(kPart, "gradient of gate and up, to be added", 2 * w.ffn * w.hidden, q.compute);
  t.phase = 0;
}

void add_head(TermTable& t, const Widths& w, const ActivationQuery& q) {
  const DType statistics = statistics_dtype(q.compute);
  const int64_t chunk = head_chunk_tokens(w.vocab, q.tokens);
  t.per_token(Part::kHead, "residual at the last norm", w.hidden, q.residual);
  t.per_token(Part::kHead, "last norm, scale", 1, statistics);
  t.per_token(Part::kHead, "last norm, output", w.hidden, q.compute);
  t.per_token(Part::kHead, "gradient made in the forward", w.hidden, q.compute);
  t.per_token(Part::kHead, "token scores and weights", 4, statistics);
  t.add(Part::kHeadWorkspace, "logits of one chunk", saturating_multiply(chunk, w.vocab),
        q.compute);
  if (q.compute != q.gradients)
    t.add(Part::kHeadWorkspace, "weight gradient before adding", w.vocab * w.hidden, q.compute);
}

int64_t sum_of(const std::vector<ActivationTerm>& terms, Part part) {
  int64_t sum = 0;
  for (const ActivationTerm& term : terms) sum += term.part == part ? term.bytes : 0;
  return sum;
}

int64_t largest_phase(const std::vector<ActivationTerm>& terms, Part part) {
  std::map<int, int64_t> phases;
  for (const ActivationTerm& term : terms)
    if (term.part == part) phases[term.phase] += term.bytes;
  int64_t largest = 0;
  for (const auto& [phase, bytes] : phases) largest = std::max(largest, bytes);
  return largest;
}

}  // namespace

int64_t allocation_bytes(int64_t bytes) {
  if (bytes <= 0) return 0;
  if (bytes <= 512) return (bytes + 63) / 64 * 64;
  const int exponent = static_cast<int>(std::bit_width(static_cast<uint64_t>(bytes))) - 1;
  const int64_t step = int64_t{1} << (exponent - 3);
  return (bytes + step - 1) / step * step;
}

ActivationBytes llama_activation_bytes(const ModelShape& shape, const ActivationQuery& query) {
  const Widths widths{shape.hidden_size,
                      shape.intermediate_size,
                      shape.num_attention_heads * shape.head_dim,
                      shape.num_key_value_heads * shape.head_dim,
                      shape.num_attention_heads,
                      shape.vocab_size};
  TermTable table{query,
                  {}};  // the embedding's output is the first layer's residual, counted there
  add_saved_by_layer(table, widths, query);
  add_layer_workspace(table, widths, query);
  add_head(table, widths, query);
  ActivationBytes bytes;
  bytes.saved_embedding = sum_of(table.terms, Part::kEmbedding);
  bytes.saved_per_layer = sum_of(table.terms, Part::kLayer);
  bytes.saved_head = sum_of(table.terms, Part::kHead);
  bytes.layer_workspace = largest_phase(table.terms, Part::kLayerWorkspace);
  bytes.head_workspace = largest_phase(table.terms, Part::kHeadWorkspace);
  bytes.terms = std::move(table.terms);
  return bytes;
}

}  // namespace capstan::plan
