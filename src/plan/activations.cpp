// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What one pass of the llama and gpt2 families keeps and needs, tensor by tensor. The table is
// meant to be read beside the layers in nn: a tensor saved there is a line here. Widths are
// elements per token.
#include <algorithm>
#include <bit>
#include <map>

#include "capstan/base/bytes.h"
#include "plan/attention_scratch_internal.h"
#include "plan/llama_internal.h"
#include "plan/saturate_internal.h"

namespace capstan::plan {
namespace {

using Part = ActivationTerm::Part;

struct Widths {
  int64_t hidden, ffn, query, key_value, heads, vocab, head_size;
  int64_t column;      // features of the MLP's first product
  int64_t statistics;  // of a norm
  std::string column_name, activated_name;
  int64_t normed = 0;  // features of query, key and value that a norm of heads keeps
  int64_t normed_heads = 0;
};

struct TermTable {
  const ActivationQuery& query;
  std::vector<ActivationTerm> terms;
  int phase = 0;

  [[nodiscard]] int64_t kept_tokens() const {
    return query.kept_tokens > 0 ? query.kept_tokens : query.tokens;
  }
  // Rows are cut over the tensor axis outside of column and row layers.
  [[nodiscard]] bool cuts_sequence() const { return kept_tokens() < query.tokens; }

  void add(Part part, const std::string& name, int64_t elements, DType dtype) {
    const int64_t bytes = saturating_multiply(elements, static_cast<int64_t>(size_of(dtype)));
    if (bytes > 0) terms.push_back({part, phase, name, allocation_bytes(bytes, query.on_gpu)});
  }
  // A saved tensor; where it is made again, it is there in some phases of the backward only.
  void save(bool remade, int first_phase, int last_phase, const std::string& name, int64_t elements,
            DType dtype) {
    if (!remade) return add(Part::kLayer, name, elements, dtype);
    for (phase = first_phase; phase <= last_phase; ++phase)
      add(Part::kLayerWorkspace, name, elements, dtype);
    phase = 0;
  }
  // For all tokens of the rank, and for those that it keeps between tensor-parallel layers.
  void per_token(Part part, const std::string& name, int64_t width, DType dtype) {
    add(part, name, saturating_multiply(query.tokens, width), dtype);
  }
  void per_kept(Part part, const std::string& name, int64_t width, DType dtype) {
    add(part, name, saturating_multiply(kept_tokens(), width), dtype);
  }
  // Saved by the layer and no longer needed in this phase.
  void release(const std::string& name, int64_t width, DType dtype, bool kept = false) {
    const size_t before = terms.size();
    if (kept)
      per_kept(Part::kLayerWorkspace, name, width, dtype);
    else
      per_token(Part::kLayerWorkspace, name, width, dtype);
    if (terms.size() > before) terms.back().bytes = -terms.back().bytes;
  }
};

// Statistics of norms and softmax: fp32, or fp64 in fp64 runs.
DType statistics_dtype(DType compute) {
  return compute == DType::kFp64 ? DType::kFp64 : DType::kFp32;
}

// Features of query, key and value that attention works on: by all-to-all those of this rank's
// heads over the whole row, which is as many tokens more as there are heads less.
int64_t attended_width(const Widths& w, const ActivationQuery& q) {
  if (q.context == 1 || !q.all_to_all) return w.query + 2 * w.key_value;
  const int64_t keys = std::max(w.head_size, w.key_value / q.context);
  return w.query + 2 * keys * q.context;
}

void add_saved_by_layer(TermTable& t, const Widths& w, const ActivationQuery& q) {
  const DType compute = q.compute, residual = q.residual, statistics = statistics_dtype(compute);
  const RemadeParts& again = q.remade;
  const auto attention = [&](const std::string& name, int64_t width, DType dtype) {
    t.save(again.attention, kAttention, kQkv, name, saturating_multiply(q.tokens, width), dtype);
  };
  const auto mlp = [&](const std::string& name, int64_t width) {
    t.save(again.mlp, kDownWeight, kGateUp, name, saturating_multiply(q.tokens, width), compute);
  };
  const auto norm = [&](int first, int last, const std::string& name) {
    t.save(again.norm, first, last, name, saturating_multiply(t.kept_tokens(), w.hidden), compute);
  };
  t.per_kept(Part::kLayer, "residual at the attention norm", w.hidden, residual);
  t.per_kept(Part::kLayer, "attention norm, scale", w.statistics, statistics);
  norm(again.attention ? kAttention : kQkv, kQkv, "attention norm, output");
  attention("query, key, value before their norm", w.normed, compute);
  attention("query and key norm, scale", w.normed_heads, statistics);
  attention("query, key, value after RoPE", attended_width(w, q), compute);
  attention("attention output", w.query, compute);
  if (q.context > 1 && q.all_to_all) attention("attention output, own heads", w.query, compute);
  attention("attention log-sum-exp", w.heads, statistics);
  t.per_kept(Part::kLayer, "residual at the feed-forward norm", w.hidden, residual);
  t.per_kept(Part::kLayer, "feed-forward norm, scale", w.statistics, statistics);
  norm(again.mlp ? kDownWeight : kGateUp, kGateUp, "feed-forward norm, output");
  mlp(w.column_name, w.column);
  mlp(w.activated_name, w.ffn);
  t.per_kept(Part::kBlockInput, "residual at the feed-forward norm", w.hidden, residual);
  t.per_kept(Part::kBlockInput, "layer output, not yet added", w.hidden, compute);
}

// Inputs and output gradients of the linear layers.
void add_weight_work(TermTable& t, const Widths& w, const ActivationQuery& q) {
  constexpr Part kPart = Part::kWeightWork;
  t.per_kept(kPart, "attention norm, output", w.hidden, q.compute);
  t.per_token(kPart, "gradient of query, key, value", w.query + 2 * w.key_value, q.compute);
  t.per_token(kPart, "attention output", w.query, q.compute);
  t.per_token(kPart, "gradient of the attention's sum", w.hidden, q.compute);
  t.per_kept(kPart, "feed-forward norm, output", w.hidden, q.compute);
  t.per_token(kPart, "gradient of " + w.column_name, w.column, q.compute);
  t.per_token(kPart, w.activated_name, w.ffn, q.compute);
  t.per_token(kPart, "gradient of the layer output", w.hidden, q.compute);
}

// The gradient of the input of a column layer on its way: parts of the sum, and under sequence
// parallel this rank's tokens of it beside the input that is gathered again. Part by part the sum
// is never whole; the output gradient, `width` wide, is then put in the order of the ranks.
void add_column_gradient(TermTable& t, const Widths& w, const ActivationQuery& q, int64_t width) {
  constexpr Part kPart = Part::kLayerWorkspace;
  if (q.overlap) {
    t.per_token(kPart, "input, gathered", w.hidden, q.compute);
    t.per_kept(kPart, "input gradient, summed", w.hidden, q.compute);
    if (q.samples > 1) t.per_token(kPart, "output gradient by ranks", width, q.compute);
    return;
  }
  t.per_token(kPart, "input gradient, to be summed", w.hidden, q.compute);
  if (!t.cuts_sequence()) return;
  t.per_token(kPart, "input, gathered", w.hidden, q.compute);
  t.per_kept(kPart, "input gradient, summed", w.hidden, q.compute);
  if (q.samples > 1) t.per_token(kPart, "input gradient by ranks", w.hidden, q.compute);
}

// The backward of a layer begins with the feed-forward part.
void add_feed_forward_workspace(TermTable& t, const Widths& w, const ActivationQuery& q) {
  constexpr Part kPart = Part::kLayerWorkspace;
  const bool adds_apart = makes_gradients_apart(q);
  const auto begin = [&](int phase, bool needs_output_gradient) {
    t.phase = phase;
    t.per_kept(kPart, "gradient of the residual", w.hidden, q.residual);
    if (!needs_output_gradient) return;
    if (q.compute != q.residual)  // else the two are one tensor
      t.per_kept(kPart, "gradient of the layer output", w.hidden, q.compute);
    if (t.cuts_sequence())
      t.per_token(kPart, "gradient of the layer output, gathered", w.hidden, q.compute);
  };
  begin(kDownWeight, true);  // down projection, weight
  if (adds_apart) t.add(kPart, "gradient of down, to be added", w.ffn * w.hidden, q.compute);
  begin(kDownInput, true);  // down projection, input
  t.per_token(kPart, "gradient of " + w.activated_name, w.ffn, q.compute);
  begin(kActivation, false);  // gate x up
  t.release(w.activated_name + ", free", w.ffn, q.compute);
  t.per_token(kPart, "gradient of " + w.activated_name, w.ffn, q.compute);
  t.per_token(kPart, "gradient of " + w.column_name, w.column, q.compute);
  begin(kGateUp, false);  // gate and up projections; their gradient takes the place of gate and up
  t.release(w.activated_name + ", free", w.ffn, q.compute);
  if (q.tensor > 1) add_column_gradient(t, w, q, w.column);
  if (adds_apart)
    t.add(kPart, "gradient of " + w.column_name + ", to be added", w.column * w.hidden, q.compute);
  t.phase = 0;
}

// The call of a rank: by all-to-all of its heads over whole rows, in a ring of the largest pair of
// chunks. A row's chunks are two for each rank; pairs are joined where every query sees every key.
std::vector<AttentionCall> attention_calls(const Widths& w, const ActivationQuery& q) {
  const int64_t key_heads = w.head_size > 0 ? w.key_value / w.head_size : 0;
  AttentionCall call{q.samples, q.sequence_length, q.sequence_length, w.heads,
                     key_heads, w.head_size,       q.documents};
  if (q.context == 1) return {call};
  if (q.all_to_all) {
    call.queries = call.keys = q.sequence_length * q.context;
    call.heads = (w.heads + q.context - 1) / q.context;
    call.key_heads = std::max<int64_t>(1, key_heads / q.context);
    return {call};
  }
  const int64_t chunk = q.sequence_length / 2;
  call.queries = call.keys = chunk;
  call.in_parts = q.samples > 1;
  std::vector<AttentionCall> calls{call};
  if (q.documents > 0 || q.plain_parts) return calls;
  call.keys = q.sequence_length;
  calls.push_back(call);
  call.queries = q.sequence_length;
  call.keys = chunk;
  call.in_parts = false;
  calls.push_back(call);
  return calls;
}

// What travels round the context ring in a backward hop: keys and values (own, here, arriving) and
// their gradients (here, leaving, arriving), and those of the queries.
void add_ring_buffers(TermTable& t, const Widths& w, const ActivationQuery& q) {
  constexpr Part kPart = Part::kLayerWorkspace;
  const DType wide = statistics_dtype(q.compute);
  t.per_token(kPart, "ring, keys and values", 3 * 2 * w.key_value, q.compute);
  t.per_token(kPart, "ring, gradients of keys and values", 3 * 2 * w.key_value, wide);
  t.per_token(kPart, "ring, gradient of the queries", w.query, wide);
}

// Gradients of the call that needs most, and what its kernel takes to make them.
void add_attention_scratch(TermTable& t, const Widths& w, const ActivationQuery& q) {
  std::vector<ScratchTensor> most;
  const auto consider = [&](const ActivationQuery& query, const AttentionCall& call) {
    std::vector<ScratchTensor> scratch = attention_scratch(query, call);
    if (q.context > 1 && !q.all_to_all)
      scratch.push_back(
          {"ring, gradients of one block",
           saturating_multiply(call.samples * call.head_size,
                               call.queries * call.heads + 2 * call.keys * call.key_heads),
           q.compute});
    if (most.empty() || scratch_bytes(q, scratch) > scratch_bytes(q, most))
      most = std::move(scratch);
  };
  ActivationQuery plain = q;
  plain.attention = AttentionKernel::kPlain;
  for (const AttentionCall& call : attention_calls(w, q)) {
    consider(q, call);
    if (q.plain_parts) consider(plain, call);
  }
  for (const ScratchTensor& tensor : most)
    t.add(Part::kLayerWorkspace, tensor.name, tensor.elements, tensor.dtype);
}

// The attention half, when the feed-forward half is free again.
void add_attention_workspace(TermTable& t, const Widths& w, const ActivationQuery& q) {
  constexpr Part kPart = Part::kLayerWorkspace;
  const auto begin = [&](int phase) {
    t.phase = phase;
    t.per_kept(kPart, "gradient of the residual", w.hidden, q.residual);
    if (q.compute != q.residual) t.per_kept(kPart, "gradient of its sum", w.hidden, q.compute);
    if (!q.remade.mlp) t.release(w.column_name + ", free", w.column, q.compute);
    if (!q.remade.mlp) t.release(w.activated_name + ", free", w.ffn, q.compute);
    if (!q.remade.norm) t.release("feed-forward norm, free", w.hidden, q.compute, true);
    t.release("residual at the feed-forward norm, free", w.hidden, q.residual, true);
  };
  const int64_t width = w.query + 2 * w.key_value, attended = attended_width(w, q);
  begin(kAttention);  // attention
  t.per_token(kPart, "gradient of the attention output", w.query, q.compute);
  add_attention_scratch(t, w, q);
  if (q.context > 1 && !q.all_to_all)
    add_ring_buffers(t, w, q);
  else
    t.per_token(kPart, "gradient of query, key, value", attended, q.compute);
  begin(kQkv);  // projection of query, key, value
  t.release("attention, free", attended + w.query, q.compute);
  t.release("query, key, value before their norm, free", w.normed, q.compute);
  if (q.context > 1 && q.all_to_all)  // back to all heads
    t.per_token(kPart, "gradients by ranks, leaving, arriving", 3 * attended, q.compute);
  t.per_token(kPart, "gradient of query, key, value", width, q.compute);
  if (q.tensor > 1) add_column_gradient(t, w, q, width);
  t.phase = 0;
}

// What the weight half waits with while the input half goes on; phases of the workspace count it
// as free, or as taken over by what follows.
void add_waiting(TermTable& t, const Widths& w, const ActivationQuery& q) {
  for (t.phase = kActivation; t.phase <= kQkv; ++t.phase)
    t.per_token(Part::kWaiting, w.activated_name, w.ffn, q.compute);
  for (t.phase = kAttention; t.phase <= kQkv; ++t.phase) {
    t.per_token(Part::kWaiting, "gradient of " + w.column_name, w.column, q.compute);
    t.per_kept(Part::kWaiting, "feed-forward norm, output", w.hidden, q.compute);
    t.per_token(Part::kWaiting, "gradient of the layer output", w.hidden, q.compute);
  }
  t.phase = kQkv;
  t.per_token(Part::kWaiting, "attention output", w.query, q.compute);
  t.per_token(Part::kWaiting, "gradient of the attention's sum", w.hidden, q.compute);
  t.phase = 0;
}

// While labels are drawn, before the logits become their gradient: scores and sums of a few rows.
void add_labels(TermTable& t, const Widths& w, const ActivationQuery& q, int64_t chunk) {
  t.phase = 1;
  t.per_kept(Part::kHeadWorkspace, "last norm, output", w.hidden, q.compute);
  if (t.cuts_sequence())
    t.per_token(Part::kHeadWorkspace, "last norm, gathered", w.hidden, q.compute);
  t.add(Part::kHeadWorkspace, "logits of one chunk", saturating_multiply(chunk, w.vocab),
        q.compute);
  const int64_t scores = saturating_multiply(label_tokens(w.vocab, chunk), w.vocab);
  for (const char* name : {"labels, scores", "labels, probabilities added up"})
    t.add(Part::kHeadWorkspace, name, scores, DType::kFp64);
  t.add(Part::kHeadWorkspace, "labels, what lies below", scores, DType::kUint8);
  t.add(Part::kHeadWorkspace, "labels, what lies below as numbers", scores, DType::kInt64);
  t.phase = 0;
}

void add_head(TermTable& t, const Widths& w, const ActivationQuery& q) {
  const DType statistics = statistics_dtype(q.compute);
  const int64_t chunk = head_chunk_tokens(w.vocab, q.tokens);
  t.per_kept(Part::kHead, "residual at the last norm", w.hidden, q.residual);
  t.per_kept(Part::kHead, "last norm, scale", w.statistics, statistics);
  t.per_kept(Part::kHead, "gradient made in the forward", w.hidden, q.compute);
  t.per_token(Part::kHead, "token scores and weights", 4, statistics);
  t.per_kept(Part::kHeadWorkspace, "last norm, output", w.hidden, q.compute);
  t.add(Part::kHeadWorkspace, "logits of one chunk", saturating_multiply(chunk, w.vocab),
        q.compute);
  if (t.cuts_sequence()) {
    t.per_token(Part::kHeadWorkspace, "last norm, gathered", w.hidden, q.compute);
    t.per_token(Part::kHeadWorkspace, "gradient of all tokens", w.hidden, q.compute);
  }
  if (makes_gradients_apart(q))
    t.add(Part::kHeadWorkspace, "weight gradient before adding", w.vocab * w.hidden, q.compute);
  if (q.draws_labels) add_labels(t, w, q, chunk);
}

int64_t sum_of(const std::vector<ActivationTerm>& terms, Part part) {
  int64_t sum = 0;
  for (const ActivationTerm& term : terms) sum += term.part == part ? term.bytes : 0;
  return sum;
}

}  // namespace

int64_t largest_phase(const std::vector<ActivationTerm>& terms, ActivationTerm::Part part,
                      ActivationTerm::Part besides) {
  std::map<int, int64_t> phases;
  for (const ActivationTerm& term : terms)
    if (term.part == part || term.part == besides) phases[term.phase] += term.bytes;
  int64_t largest = 0;
  for (const auto& [phase, bytes] : phases) largest = std::max(largest, bytes);
  return largest;
}

int64_t allocation_bytes(int64_t bytes, bool on_gpu) {
  if (bytes <= 0) return 0;
  if (on_gpu) return (bytes + 511) / 512 * 512;
  if (bytes <= 512) return (bytes + 63) / 64 * 64;
  const int exponent = static_cast<int>(std::bit_width(static_cast<uint64_t>(bytes))) - 1;
  const int64_t step = int64_t{1} << (exponent - 3);
  return (bytes + step - 1) / step * step;
}

ActivationBytes decoder_activation_bytes(const ModelShape& shape, const ActivationQuery& query,
                                         const DecoderForm& form) {
  Widths widths{shape.hidden_size,
                shape.intermediate_size,
                shape.num_attention_heads * shape.head_dim,
                shape.num_key_value_heads * shape.head_dim,
                shape.num_attention_heads,
                shape.vocab_size,
                shape.head_dim,
                form.products * shape.intermediate_size,
                form.norm_statistics,
                form.column,
                form.activated};
  if (shape.qk_norm) {
    widths.normed = widths.query + 2 * widths.key_value;
    widths.normed_heads = shape.num_attention_heads + shape.num_key_value_heads;
  }
  TermTable table{query,
                  {}};  // the embedding's output is the first layer's residual, counted there
  add_saved_by_layer(table, widths, query);
  add_weight_work(table, widths, query);
  add_feed_forward_workspace(table, widths, query);
  add_attention_workspace(table, widths, query);
  add_waiting(table, widths, query);
  add_head(table, widths, query);
  ActivationBytes bytes;
  bytes.saved_embedding = sum_of(table.terms, Part::kEmbedding);
  bytes.saved_per_layer = sum_of(table.terms, Part::kLayer);
  bytes.saved_head = sum_of(table.terms, Part::kHead);
  bytes.layer_workspace = largest_phase(table.terms, Part::kLayerWorkspace, Part::kLayerWorkspace);
  bytes.split_layer_workspace = largest_phase(table.terms, Part::kLayerWorkspace, Part::kWaiting);
  bytes.head_workspace = largest_phase(table.terms, Part::kHeadWorkspace, Part::kHeadWorkspace);
  bytes.block_input = sum_of(table.terms, Part::kBlockInput);
  bytes.weight_work = sum_of(table.terms, Part::kWeightWork);
  bytes.terms = std::move(table.terms);
  return bytes;
}

ActivationBytes llama_activation_bytes(const ModelShape& shape, const ActivationQuery& query) {
  return decoder_activation_bytes(shape, query, {});
}

}  // namespace capstan::plan
