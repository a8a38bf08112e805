// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens of the whole rows, t = T / n tokens of one of the n ranks, N query
// heads, K key/value heads, H head size, X features of all heads, Y those of one rank's heads.
#include "parallel/context_all_to_all_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/parallel/context_split.h"

namespace capstan::parallel {
namespace {

// Which heads each rank works on.
struct HeadPlan {
  int ranks;
  ops::AttentionHeads all, one;  // of all ranks, of one rank

  HeadPlan(const ops::AttentionHeads& heads, int n) : ranks(n), all(heads), one(heads) {
    const int64_t queries = heads.query_heads, keys = heads.key_value_heads;
    CAPSTAN_CHECK(queries % n == 0 && (keys % n == 0 || n % keys == 0),
                  "all-to-all attention: {} query and {} key/value heads of this rank over {} "
                  "context ranks; query heads must divide by the ranks, and key/value heads and "
                  "ranks one another",
                  queries, keys, n);
    one.query_heads = queries / n;
    one.key_value_heads = std::max<int64_t>(1, keys / n);
  }

  // Features of rank r's heads within [q | k | v] of all heads.
  struct Slice {
    int64_t begin, size;
  };
  [[nodiscard]] std::array<Slice, 3> slices(int r) const {
    const int64_t size = all.head_size, queries = all.query_heads, keys = all.key_value_heads;
    const int64_t first_key = keys * r / ranks;
    return {{{one.query_heads * r * size, one.query_heads * size},
             {(queries + first_key) * size, one.key_value_heads * size},
             {(queries + keys + first_key) * size, one.key_value_heads * size}}};
  }
  [[nodiscard]] int64_t features() const {
    return (one.query_heads + 2 * one.key_value_heads) * one.head_size;
  }
};

Tensor swapped(const comm::Communicator& group, const Tensor& parts) {
  const Tensor out = at::empty(parts.sizes(), parts.options().requires_grad(false));
  group.all_to_all(out, parts).wait();
  return out;
}

// [n, B, t, Y] from each rank's tokens -> [B, T, Y], and back.
Tensor rows_of_parts(const Tensor& parts_nBtY) { return join_sequence(parts_nBtY.unbind(0)); }
Tensor parts_of_rows(const Tensor& rows_BTY, int ranks) {
  std::vector<Tensor> parts;
  for (int r = 0; r < ranks; ++r) parts.push_back(split_sequence(rows_BTY, ranks, r));
  return at::stack(parts);
}

// [B, t, X] of all heads -> [n, B, t, Y], the heads of rank r in part r; heads of several ranks are
// copied.
Tensor heads_by_rank(const HeadPlan& plan, const Tensor& qkv_BtX) {
  const Tensor out = at::empty({plan.ranks, qkv_BtX.size(0), qkv_BtX.size(1), plan.features()},
                               qkv_BtX.options().requires_grad(false));
  for (int r = 0; r < plan.ranks; ++r) {
    int64_t to = 0;
    for (const auto& [begin, size] : plan.slices(r)) {
      out[r].narrow(2, to, size).copy_(qkv_BtX.narrow(2, begin, size));
      to += size;
    }
  }
  return out;
}

// The transpose: copies are summed, in at least fp32.
Tensor sum_of_heads(const HeadPlan& plan, const Tensor& parts_nBtY) {
  const auto& h = plan.all;
  const bool copies = plan.one.key_value_heads * plan.ranks > h.key_value_heads;
  const bool narrow = parts_nBtY.element_size() < 4;
  const auto options =
      copies && narrow ? parts_nBtY.options().dtype(at::kFloat) : parts_nBtY.options();
  const Tensor out = at::zeros({parts_nBtY.size(1), parts_nBtY.size(2),
                                (h.query_heads + 2 * h.key_value_heads) * h.head_size},
                               options);
  for (int r = 0; r < plan.ranks; ++r) {
    int64_t from = 0;
    for (const auto& [begin, size] : plan.slices(r)) {
      out.narrow(2, begin, size).add_(parts_nBtY[r].narrow(2, from, size));
      from += size;
    }
  }
  return out.to(parts_nBtY.scalar_type());
}

Tensor to_heads(const ContextAttention& call, const HeadPlan& plan, const Tensor& qkv_BtX) {
  Tensor rows_BTY;
  {
    at::NoGradGuard no_grad;
    rows_BTY = rows_of_parts(swapped(call.group, heads_by_rank(plan, qkv_BtX)));
  }
  return ops::record(
      rows_BTY,
      {"context_to_heads",
       {qkv_BtX},
       {},
       {},
       [group = call.group, plan](const ops::Tensors&, ops::Tensors& grads) -> ops::Tensors {
         at::NoGradGuard no_grad;
         return {sum_of_heads(plan, swapped(group, parts_of_rows(grads[0], plan.ranks)))};
       }});
}

// [B, T, Z] of this rank's heads -> [B, t, n Z] of all heads, and back.
Tensor tokens_of_heads(const comm::Communicator& group, const Tensor& rows_BTZ) {
  const Tensor parts_nBtZ = swapped(group, parts_of_rows(rows_BTZ, group.size()));
  return parts_nBtZ.permute({1, 2, 0, 3})
      .reshape({parts_nBtZ.size(1), parts_nBtZ.size(2), parts_nBtZ.size(0) * parts_nBtZ.size(3)});
}
Tensor heads_of_tokens(const comm::Communicator& group, const Tensor& x_BtX) {
  const Tensor parts_nBtZ =
      x_BtX.reshape({x_BtX.size(0), x_BtX.size(1), group.size(), x_BtX.size(2) / group.size()})
          .permute({2, 0, 1, 3})
          .contiguous();
  return rows_of_parts(swapped(group, parts_nBtZ));
}

Tensor to_tokens(const comm::Communicator& group, const Tensor& rows_BTZ) {
  Tensor out;
  {
    at::NoGradGuard no_grad;
    out = tokens_of_heads(group, rows_BTZ).detach();
  }
  return ops::record(out, {"context_to_tokens",
                           {rows_BTZ},
                           {},
                           {},
                           [group](const ops::Tensors&, ops::Tensors& grads) -> ops::Tensors {
                             at::NoGradGuard no_grad;
                             return {heads_of_tokens(group, grads[0])};
                           }});
}

// first_key of the whole rows. Small, and left out of the traffic that layouts are judged by.
Tensor whole_first_key(const ContextAttention& call) {
  if (!call.first_key_Bt.defined()) return {};
  const Tensor mine = call.first_key_Bt.contiguous();
  std::vector<int64_t> sizes = mine.sizes().vec();
  sizes.insert(sizes.begin(), call.group.size());
  const Tensor all_nBt = at::empty(sizes, mine.options());
  call.group.control().all_gather(all_nBt, mine).wait();
  return rows_of_parts(all_nBt);
}

}  // namespace

Tensor all_to_all_attention(const ContextAttention& call, const Tensor& qkv) {
  const HeadPlan plan(call.heads, call.group.size());
  const Tensor rows_BTY = to_heads(call, plan, qkv);
  const Tensor out_BTZ = ops::attention(rows_BTY, plan.one,
                                        {.sliding_window = call.sliding_window,
                                         .first_key_BT = whole_first_key(call),
                                         .documents = call.documents});
  return to_tokens(call.group, out_BTZ);
}

}  // namespace capstan::parallel
