// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, t tokens of this rank, s = t keys of another rank, N query heads, K key/value
// heads, H head size, X = (N + 2K) H, C = 2 K H features of keys and values.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <utility>

#include "capstan/base/check.h"
#include "parallel/ring_attention_internal.h"
#include "parallel/ring_blocks_internal.h"
#include "parallel/ring_exchange_internal.h"

namespace capstan::parallel {
namespace {

Tensor heads_of(const Tensor& x, int64_t first, int64_t count, int64_t head_size) {
  return x.narrow(2, first * head_size, count * head_size)
      .view({x.size(0), x.size(1), count, head_size});
}

// One rank's view of the ring.
class Ring {
 public:
  Ring(const ContextAttention& call, int64_t tokens)
      : call_(call), group_(call.group), ranks_(group_.size()), rank_(group_.rank()) {
    mask_.ranks = ranks_;
    mask_.row_length = tokens * ranks_;
    mask_.sliding_window = call.sliding_window;
    if (call.first_key_Bt.defined()) read_first_keys(tokens);
  }

  [[nodiscard]] int ranks() const { return ranks_; }
  // Whose keys are here after `hop` hops.
  [[nodiscard]] int source(int hop) const { return (rank_ + ranks_ - hop) % ranks_; }
  [[nodiscard]] std::vector<RingBlock> blocks(int hop) const {
    return ring_blocks(mask_, rank_, source(hop));
  }

  [[nodiscard]] RingExchange pass_on(const Tensor& x) const { return {group_, x}; }

  [[nodiscard]] ops::AttentionMask mask_of(const RingBlock& block) const {
    ops::AttentionMask mask{.query_offset = block.query_offset};
    if (block.windowed) mask.sliding_window = call_.sliding_window;
    if (block.documents) add_documents(mask, block);
    return mask;
  }

 private:
  void add_documents(ops::AttentionMask& mask, const RingBlock& block) const {
    mask.first_key_BT =
        (call_.first_key_Bt.narrow(1, block.query_begin, block.queries) - block.key_row)
            .contiguous();
    const Tensor& starts_CE = call_.documents.chunks_CE;
    if (!starts_CE.defined()) return;
    const int64_t chunk = mask_.row_length / starts_CE.size(0);
    const int64_t of_keys = block.key_row / chunk, ahead = block.query_offset / chunk;
    mask.documents = {starts_CE[of_keys], std::min(call_.documents.longest, chunk), {}};
    if (ahead > 0) mask.query_starts = starts_CE[of_keys + ahead];
  }

  // On a device the host does not wait to see them: every part may be cut by documents, and it is
  // left out where the host knew before that nobody sees it.
  void read_first_keys(int64_t tokens) {
    const Tensor& first = call_.first_key_Bt;
    CAPSTAN_CHECK(first.dim() == 2 && first.size(1) == tokens && first.scalar_type() == at::kInt,
                  "ring attention: first_key must be int32 [B, {}]", tokens);
    if (first.numel() == 0) return;
    for (size_t half = 0; half < 2; ++half) {
      if (!first.is_cpu()) {
        mask_.first_keys[half] = {call_.lowest_first_key[half], mask_.row_length};
        continue;
      }
      const Tensor part = first.narrow(1, static_cast<int64_t>(half) * (tokens / 2), tokens / 2);
      mask_.first_keys[half] = {part.min().item<int32_t>(), part.max().item<int32_t>()};
    }
  }

  const ContextAttention& call_;
  comm::Communicator group_;
  int ranks_, rank_;
  RingMask mask_;
};

struct Inputs {
  Tensor q_BtNH, kv_BtC;
};
Inputs inputs_of(const Tensor& qkv, const ops::AttentionHeads& h) {
  const int64_t kv_begin = h.query_heads * h.head_size;
  return {heads_of(qkv, 0, h.query_heads, h.head_size),
          qkv.narrow(2, kv_begin, qkv.size(2) - kv_begin).contiguous()};
}

struct KeysValues {
  Tensor k_BsKH, v_BsKH;
};
KeysValues keys_values(const Tensor& kv_BtC, const RingBlock& block, const ops::AttentionHeads& h) {
  const Tensor part = kv_BtC.narrow(1, block.key_begin, block.keys);
  return {heads_of(part, 0, h.key_value_heads, h.head_size),
          heads_of(part, h.key_value_heads, h.key_value_heads, h.head_size)};
}

MergedAttention ring_forward(const ContextAttention& call, const Tensor& qkv) {
  const Ring ring(call, qkv.size(1));
  Inputs in = inputs_of(qkv, call.heads);
  const MergedAttention whole = nothing_seen(in.q_BtNH);
  for (int hop = 0; hop < ring.ranks(); ++hop) {
    const bool is_last = hop + 1 == ring.ranks();
    RingExchange next = is_last ? RingExchange() : ring.pass_on(in.kv_BtC);
    for (const RingBlock& block : ring.blocks(hop)) {
      const auto [k, v] = keys_values(in.kv_BtC, block, call.heads);
      const Tensor q = in.q_BtNH.narrow(1, block.query_begin, block.queries);
      merge_(whole, ops::attention_forward(q, k, v, call.heads.scale, ring.mask_of(block)),
             block.query_begin);
    }
    if (!is_last) in.kv_BtC = next.finish();
  }
  return whole;
}

struct SavedRing {
  Tensor qkv_BtX, out_BtNH, lse_BNt, grad_BtNH;
};

// Adds the gradients of one block to those of the queries and of the keys and values.
void add_block(const ContextAttention& call, const SavedRing& saved, const RingBlock& block,
               const ops::AttentionMask& mask, const Tensor& kv, const Tensor& dq_BtNH,
               const Tensor& dkv_BtC) {
  const auto h = call.heads;
  const auto queries = [&](const Tensor& x) {
    return x.narrow(1, block.query_begin, block.queries);
  };
  const auto [k, v] = keys_values(kv, block, h);
  const Tensor q = queries(heads_of(saved.qkv_BtX, 0, h.query_heads, h.head_size));
  const Tensor dq = at::empty(q.sizes(), q.options());
  const Tensor dkv = at::empty({kv.size(0), block.keys, kv.size(2)}, kv.options());
  const ops::AttentionGrads into{dq, heads_of(dkv, 0, h.key_value_heads, h.head_size),
                                 heads_of(dkv, h.key_value_heads, h.key_value_heads, h.head_size)};
  ops::attention_backward(
      queries(saved.grad_BtNH), {q, k, v},
      {queries(saved.out_BtNH), saved.lse_BNt.narrow(2, block.query_begin, block.queries)}, h.scale,
      mask, into);
  queries(dq_BtNH).add_(dq);
  dkv_BtC.narrow(1, block.key_begin, block.keys).add_(dkv);
}

// At hop i this rank holds the keys of rank - i, and takes over their gradient so far. The gradient
// travels while the next block is computed; after the last hop it goes one further, home.
Tensor ring_backward(const ContextAttention& call, const SavedRing& saved) {
  const Ring ring(call, saved.qkv_BtX.size(1));
  const auto wide = saved.lse_BNt.options();
  const Inputs in = inputs_of(saved.qkv_BtX, call.heads);
  Tensor kv = in.kv_BtC;
  const Tensor dq_BtNH = at::zeros(in.q_BtNH.sizes(), wide);
  RingExchange gradient;
  for (int hop = 0; hop < ring.ranks(); ++hop) {
    const bool is_last = hop + 1 == ring.ranks();
    RingExchange next = is_last ? RingExchange() : ring.pass_on(kv);
    Tensor dkv_BtC = at::zeros(kv.sizes(), wide);
    for (const RingBlock& block : ring.blocks(hop))
      add_block(call, saved, block, ring.mask_of(block), kv, dq_BtNH, dkv_BtC);
    if (hop > 0) dkv_BtC.add_(gradient.finish());
    gradient = ring.pass_on(dkv_BtC);
    if (!is_last) kv = next.finish();
  }
  const Tensor dkv_BtC = gradient.finish();
  const auto sizes = saved.qkv_BtX.sizes();
  const Tensor d_qkv = at::empty(sizes, saved.qkv_BtX.options());
  const int64_t queries = call.heads.query_heads * call.heads.head_size;
  d_qkv.narrow(2, 0, queries).copy_(dq_BtNH.view({sizes[0], sizes[1], queries}));
  d_qkv.narrow(2, queries, sizes[2] - queries).copy_(dkv_BtC);
  return d_qkv;
}

}  // namespace

Tensor ring_attention(const ContextAttention& call, const Tensor& qkv) {
  const auto& h = call.heads;
  CAPSTAN_CHECK(
      qkv.dim() == 3 && qkv.size(2) == (h.query_heads + 2 * h.key_value_heads) * h.head_size,
      "ring attention: {} features for {} + 2 x {} heads of {}", qkv.size(-1), h.query_heads,
      h.key_value_heads, h.head_size);
  Tensor out, lse;
  {
    at::NoGradGuard no_grad;
    const MergedAttention whole = ring_forward(call, qkv);
    out = whole.out_BtNH.view({qkv.size(0), qkv.size(1), h.query_heads * h.head_size})
              .to(qkv.scalar_type())
              .detach();
    lse = whole.lse_BNt;
  }
  return ops::record(out, {"ring_attention",
                           {qkv},
                           {},
                           {qkv, out, lse},
                           [call](const ops::Tensors& saved, ops::Tensors& grads) -> ops::Tensors {
                             at::NoGradGuard no_grad;
                             const auto& heads = call.heads;
                             const std::vector<int64_t> sizes{saved[0].size(0), saved[0].size(1),
                                                              heads.query_heads, heads.head_size};
                             return {ring_backward(call, {saved[0], saved[1].view(sizes), saved[2],
                                                          grads[0].reshape(sizes)})};
                           }});
}

}  // namespace capstan::parallel
