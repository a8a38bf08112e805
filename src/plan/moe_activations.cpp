// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What one pass of an expert layer keeps and needs. The attention half, the embedding and the head
// are llama's. Rows that experts compute are counted as if the load were even: the rank's tokens x
// per_token, wherever they come from; an expert-parallel rank that gets more keeps more. Where all
// experts have room for as many rows, those are counted.
#include <algorithm>
#include <map>

#include "plan/llama_internal.h"
#include "plan/moe_internal.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {
namespace {

using Part = ActivationTerm::Part;

// Phases of the backward, after those of llama's layer; the last one is of one product for the
// weights of all experts.
constexpr int kFirstPhase = 8, kInputPhase = 11, kLastPhase = 12;

DType statistics_dtype(DType compute) {
  return compute == DType::kFp64 ? DType::kFp64 : DType::kFp32;
}

struct Terms {
  std::vector<ActivationTerm>& list;
  bool on_gpu = false;
  Part part = Part::kLayer;
  int phase = 0;

  void add(const char* name, int64_t rows, int64_t width, DType dtype) {
    const int64_t bytes =
        saturating_multiply(saturating_multiply(rows, width), static_cast<int64_t>(size_of(dtype)));
    if (bytes > 0) list.push_back({part, phase, name, allocation_bytes(bytes, on_gpu)});
  }
  void release(const char* name, int64_t rows, int64_t width, DType dtype) {
    const size_t before = list.size();
    add(name, rows, width, dtype);
    if (list.size() > before) list.back().bytes = -list.back().bytes;
  }
};

// Ranks of the tensor axis share the tokens out to route them.
int64_t routed_tokens(const ActivationQuery& q) { return (q.tokens + q.tensor - 1) / q.tensor; }

void add_saved(Terms& t, const ModelShape& shape, const ActivationQuery& q, int64_t rows) {
  const ExpertShape& e = shape.experts;
  const DType wide = statistics_dtype(q.compute);
  const int64_t routed = routed_tokens(q);
  const bool takes_own = q.tensor > 1 && q.kept_tokens == q.tokens;  // else they are own already
  if (takes_own) t.add("own tokens", routed, shape.hidden_size, q.compute);
  t.add("router logits", routed, e.count, wide);
  t.add("chosen experts", routed, e.per_token, DType::kInt64);
  t.add("weights of the chosen", routed, e.per_token, wide);
  t.add("places of the chosen", routed, e.per_token, DType::kInt64);
  t.add("slots in expert order", rows, 1, DType::kInt64);
  t.add("tokens in expert order", rows, shape.hidden_size, q.compute);
  t.add("experts, gate and up", rows, 2 * e.intermediate_size, q.compute);
  t.add("experts, gate x up", rows, e.intermediate_size, q.compute);
  t.add("experts, output", rows, shape.hidden_size, q.compute);
  if (e.shared_intermediate_size == 0) return;
  t.add("shared expert, gate and up", q.tokens, 2 * e.shared_intermediate_size, q.compute);
  t.add("shared expert, gate x up", q.tokens, e.shared_intermediate_size, q.compute);
  if (e.shared_gate) t.add("shared expert, output", q.tokens, shape.hidden_size, q.compute);
  if (e.shared_gate) t.add("shared expert, gate", q.tokens, 1, q.compute);
}

// The backward of the experts, from the combination of their outputs back to their inputs.
void add_workspace(Terms& t, const ModelShape& shape, const ActivationQuery& q, int64_t rows) {
  const int64_t hidden = shape.hidden_size, ffn = shape.experts.intermediate_size;
  const int64_t together = q.grouped_experts;
  const bool adds_apart = makes_gradients_apart(q) && together == 0;
  const auto begin = [&](int phase) {
    t.phase = phase;
    t.add("gradient of the residual", q.tokens, hidden, q.residual);
    if (q.compute != q.residual) t.add("gradient of the layer output", q.tokens, hidden, q.compute);
  };
  begin(kFirstPhase);
  t.add("gradient of the experts' output", rows, hidden, q.compute);
  begin(9);
  t.release("experts, output, free", rows, hidden, q.compute);
  t.add("gradient of the experts' output", rows, hidden, q.compute);
  if (together == 0) t.add("experts, gradient of gate x up", rows, ffn, q.compute);
  t.add("gradients of all down, to be added", together * ffn, hidden, q.compute);
  if (adds_apart) t.add("gradient of one down, to be added", ffn, hidden, q.compute);
  begin(10);
  t.release("experts, output, free", rows, hidden, q.compute);
  t.release("experts, gate x up, free", rows, ffn, q.compute);
  t.add("experts, gradient of gate x up", rows, ffn, q.compute);
  t.add("experts, gradient of gate and up", rows, 2 * ffn, q.compute);
  begin(kInputPhase);
  t.release("experts, output, free", rows, hidden, q.compute);
  t.release("experts, gate x up, free", rows, ffn, q.compute);
  t.release("experts, gate and up, free", rows, 2 * ffn, q.compute);
  t.add("experts, gradient of gate and up", rows, 2 * ffn, q.compute);
  t.add("gradient of the tokens in expert order", rows, hidden, q.compute);
  if (adds_apart) t.add("gradient of one gate and up, to be added", 2 * ffn, hidden, q.compute);
  if (together == 0) return;
  begin(kLastPhase);
  t.release("experts, output, free", rows, hidden, q.compute);
  t.release("experts, gate x up, free", rows, ffn, q.compute);
  t.release("experts, gate and up, free", rows, 2 * ffn, q.compute);
  t.add("experts, gradient of gate and up", rows, 2 * ffn, q.compute);
  t.add("gradients of all gate and up, to be added", together * 2 * ffn, hidden, q.compute);
}

// What the weight half of a split backward holds of the experts; of that, what phases of the input
// half hold to be free.
void add_put_off(Terms& t, const ModelShape& shape, const ActivationQuery& q, int64_t rows) {
  const ExpertShape& e = shape.experts;
  t.part = Part::kWeightWork;
  t.phase = 0;
  t.add("tokens in expert order", rows, shape.hidden_size, q.compute);
  t.add("experts, gradient of gate and up", rows, 2 * e.intermediate_size, q.compute);
  t.add("experts, gate x up", rows, e.intermediate_size, q.compute);
  t.add("gradient of the experts' output", rows, shape.hidden_size, q.compute);
  t.add("shared expert, gradient of gate and up", q.tokens, 2 * e.shared_intermediate_size,
        q.compute);
  t.add("shared expert, gate x up", q.tokens, e.shared_intermediate_size, q.compute);
  t.part = Part::kWaiting;
  for (t.phase = kInputPhase - 1; t.phase <= kInputPhase; ++t.phase) {
    t.add("experts, gate x up", rows, e.intermediate_size, q.compute);
    t.add("gradient of the experts' output", rows, shape.hidden_size, q.compute);
  }
}

// Adds the terms from `first` on to the sums.
void add_sums(ActivationBytes& bytes, size_t first) {
  std::map<int, int64_t> phases, split_phases;
  for (size_t i = first; i < bytes.terms.size(); ++i) {
    const ActivationTerm& term = bytes.terms[i];
    if (term.part == Part::kLayer) bytes.saved_per_layer += term.bytes;
    if (term.part == Part::kWeightWork) bytes.weight_work += term.bytes;
    if (term.part == Part::kLayerWorkspace) phases[term.phase] += term.bytes;
    if (term.part == Part::kLayerWorkspace || term.part == Part::kWaiting)
      split_phases[term.phase] += term.bytes;
  }
  for (const auto& [phase, sum] : phases)
    bytes.layer_workspace = std::max(bytes.layer_workspace, sum);
  for (const auto& [phase, sum] : split_phases)
    bytes.split_layer_workspace = std::max(bytes.split_layer_workspace, sum);
}

}  // namespace

ActivationBytes moe_activation_bytes(const ModelShape& shape, const ActivationQuery& query) {
  ModelShape rest = shape;
  rest.intermediate_size = 0;
  ActivationBytes bytes = llama_activation_bytes(rest, query);
  const size_t before = bytes.terms.size();
  const int64_t rows = query.exchanged_rows > 0
                           ? query.exchanged_rows
                           : saturating_multiply(routed_tokens(query), shape.experts.per_token);
  Terms terms{bytes.terms, query.on_gpu};
  for (terms.phase = kFirstPhase; terms.phase <= kLastPhase; ++terms.phase) {
    terms.part = Part::kLayerWorkspace;
    if (query.remade.norm)
      terms.add("feed-forward norm, output", query.tokens, shape.hidden_size, query.compute);
    if (query.remade.mlp) add_saved(terms, shape, query, rows);
  }
  terms.phase = 0;
  terms.part = Part::kLayer;
  if (!query.remade.mlp) add_saved(terms, shape, query, rows);
  terms.part = Part::kLayerWorkspace;
  add_workspace(terms, shape, query, rows);
  add_put_off(terms, shape, query, rows);
  add_sums(bytes, before);
  return bytes;
}

}  // namespace capstan::plan
