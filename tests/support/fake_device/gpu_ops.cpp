// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/gpu_ops.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "support/fake_device/efficient_attention.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/memory.h"

namespace capstan::test {
namespace fake {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::atomic<int64_t> calls = 0;  // of FlashAttention with lengths
std::atomic<int64_t> grouped_calls = 0, batched_calls = 0;

bool is_narrow(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

// mm and addmm with a type of the result: 16-bit factors, fp32 sums.

void check_factors(const Tensor& a, const Tensor& b, at::ScalarType type, const Tensor& out) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "mm: ", a.sizes(), " and ",
              b.sizes());
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "mm: ", a.scalar_type(), " and ",
              b.scalar_type());
  TORCH_CHECK(type == a.scalar_type() || (type == at::kFloat && is_narrow(a)),
              "mm: out_dtype must be the inputs' or fp32 for 16-bit inputs");
  TORCH_CHECK(out.scalar_type() == type && out.sizes() == at::IntArrayRef({a.size(0), b.size(1)}),
              "mm: the result is ", out.sizes(), " of ", out.scalar_type());
}

Tensor product(const Tensor& a, const Tensor& b) {
  return at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

Tensor& mm_wide(const Tensor& a, const Tensor& b, at::ScalarType type, Tensor& out) {
  check_factors(a, b, type, out);
  return out.copy_(product(a, b));
}

Tensor& addmm_wide(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType type,
                   const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  check_factors(a, b, type, out);
  TORCH_CHECK(self.scalar_type() == type || self.scalar_type() == a.scalar_type(),
              "addmm: self is ", self.scalar_type());
  const Tensor scaled = product(a, b).mul(alpha);
  return out.copy_(beta.equal(0) ? scaled : scaled.add(self, beta));
}

// One side of each matrix lies together; the result adds to itself.
Tensor& baddbmm_wide(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType type,
                     const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && out.dim() == 3 && a.size(0) == b.size(0) &&
                  out.size(0) == a.size(0) && alpha.equal(1),
              "baddbmm: ", a.sizes(), " and ", b.sizes(), " -> ", out.sizes());
  TORCH_CHECK(self.const_data_ptr() == out.const_data_ptr() && self.strides() == out.strides(),
              "baddbmm: a result apart from self is not imitated");
  for (const Tensor& x : {a, b, out})
    TORCH_CHECK(x.stride(1) == 1 || x.stride(2) == 1, "baddbmm: strides of ", x.strides());
  for (int64_t g = 0; g < a.size(0); ++g) {
    check_factors(a[g], b[g], type, out[g]);
    const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor product = at::mm(a[g].to(wide), b[g].to(wide));
    out[g].copy_(beta.equal(0) ? product : product.add(out[g], beta));
  }
  ++batched_calls;
  return out;
}

// FlashAttention.

// One sequence of queries and keys, among those of all.
struct Sequence {
  int64_t query, queries, key, keys;
};
struct Flash {
  std::vector<Sequence> sequences;
  int64_t left, right;  // keys beside the diagonal that ends at the last key; < 0: all
  double scale;
};

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(is_narrow(q), "FlashAttention only supports fp16 and bf16, got ", q.scalar_type());
  for (const Tensor& x : {q, k, v})
    TORCH_CHECK(x.scalar_type() == q.scalar_type() && x.stride(-1) == 1 &&
                    x.size(-1) == q.size(-1) && x.dim() == q.dim(),
                "FlashAttention: inputs that differ, or heads with gaps");
  // Loads are of 16 bytes.
  for (const Tensor& x : {q, k, v})
    TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                    x.stride(-2) % 8 == 0 && x.stride(-3) % 8 == 0,
                "FlashAttention: data that is not aligned, strides ", x.strides());
  TORCH_CHECK(q.size(-1) % 8 == 0 && q.size(-1) <= 256, "FlashAttention: heads of ", q.size(-1));
  TORCH_CHECK(q.size(-2) % k.size(-2) == 0, "FlashAttention: heads do not divide");
}

std::vector<Sequence> rows(const Tensor& q, const Tensor& k, int64_t max_q, int64_t max_k) {
  TORCH_CHECK(q.dim() == 4 && max_q == q.size(1) && max_k == k.size(1), "FlashAttention: rows");
  std::vector<Sequence> list;
  for (int64_t b = 0; b < q.size(0); ++b) list.push_back({b * max_q, max_q, b * max_k, max_k});
  return list;
}

// The library drops what lies behind a maximum that is too small, leaves what no sequence covers
// unwritten, and takes sequences of one query for those of decoding.
std::vector<Sequence> cumulated(const Tensor& q, const Tensor& k, const Tensor& starts_q,
                                const Tensor& starts_k, int64_t max_q, int64_t max_k) {
  TORCH_CHECK(q.dim() == 3, "FlashAttention: [tokens, heads, size] with lengths");
  for (const Tensor& x : {starts_q, starts_k})
    TORCH_CHECK(x.scalar_type() == at::kInt && x.dim() == 1 && x.is_contiguous() && x.numel() > 1,
                "FlashAttention: cu_seqlens");
  TORCH_CHECK(starts_q.numel() == starts_k.numel(), "FlashAttention: cu_seqlens differ");
  TORCH_CHECK(max_q > 1, "FlashAttention: sequences of one query are not imitated");
  const auto* const s_q = starts_q.const_data_ptr<int32_t>();
  const auto* const s_k = starts_k.const_data_ptr<int32_t>();
  std::vector<Sequence> list;
  for (int64_t i = 0; i + 1 < starts_q.numel(); ++i) {
    list.push_back({s_q[i], s_q[i + 1] - s_q[i], s_k[i], s_k[i + 1] - s_k[i]});
    const Sequence& s = list.back();
    TORCH_CHECK(s.queries >= 0 && s.queries <= max_q && s.keys >= 0 && s.keys <= max_k,
                "FlashAttention: a sequence of ", s.queries, " queries, at most ", max_q);
  }
  const Sequence &first = list.front(), &last = list.back();
  TORCH_CHECK(first.query == 0 && last.query + last.queries == q.size(0) && first.key == 0 &&
                  last.key + last.keys == k.size(0),
              "FlashAttention: sequences do not cover the tokens");
  return list;
}

Flash make_flash(const Tensor& q, const Tensor& k, const MaybeTensor& starts_q,
                 const MaybeTensor& starts_k, int64_t max_q, int64_t max_k, bool causal,
                 const std::optional<double>& scale, std::optional<int64_t> left,
                 std::optional<int64_t> right) {
  const bool has_starts = starts_q && starts_q->defined();
  return {
      has_starts ? cumulated(q, k, *starts_q, *starts_k, max_q, max_k) : rows(q, k, max_q, max_k),
      left.value_or(-1), causal ? 0 : right.value_or(-1), scale.value()};
}

Tensor tokens_GNH(const Tensor& x) { return x.dim() == 4 ? x.flatten(0, 1) : x; }

// fp32, heads in front; key/value heads repeated for their query heads.
Tensor heads_NTH(const Tensor& x_GNH, int64_t first, int64_t count, int64_t repeat = 1) {
  return x_GNH.narrow(0, first, count)
      .to(at::kFloat)
      .repeat_interleave(repeat, 1)
      .transpose(0, 1)
      .contiguous();
}

Tensor scores_NTS(const Flash& flash, const Sequence& s, const Tensor& q_NTH, const Tensor& k_NSH) {
  const Tensor ahead_TS =
      at::arange(s.keys).unsqueeze(0) - (at::arange(s.queries).unsqueeze(1) + (s.keys - s.queries));
  Tensor hidden_TS = at::zeros_like(ahead_TS, at::kBool);
  if (flash.right >= 0) hidden_TS = hidden_TS.logical_or(ahead_TS > flash.right);
  if (flash.left >= 0) hidden_TS = hidden_TS.logical_or(ahead_TS < -flash.left);
  return at::matmul(q_NTH, k_NSH.transpose(1, 2))
      .mul(flash.scale)
      .masked_fill(hidden_TS, -std::numeric_limits<double>::infinity());
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Forward flash_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                      const MaybeTensor& starts_q, const MaybeTensor& starts_k, int64_t max_q,
                      int64_t max_k, double dropout, bool causal, bool debug,
                      std::optional<double> scale, std::optional<int64_t> left,
                      std::optional<int64_t> right, const MaybeTensor& used,
                      const MaybeTensor& slopes) {
  TORCH_CHECK(dropout == 0 && !debug && !used && !slopes, "FlashAttention: not imitated");
  check_inputs(q, k, v);
  calls += q.dim() == 3;
  const Flash flash =
      make_flash(q, k, starts_q, starts_k, max_q, max_k, causal, scale, left, right);
  const Tensor q_GNH = tokens_GNH(q), k_GKH = tokens_GNH(k), v_GKH = tokens_GNH(v);
  const int64_t heads = q_GNH.size(1), repeat = heads / k_GKH.size(1);
  const Tensor out = at::empty(q.sizes(), q.options()), out_GNH = tokens_GNH(out);
  const Tensor lse_NG = at::empty({heads, q_GNH.size(0)}, at::kFloat);
  for (const Sequence& s : flash.sequences) {
    if (s.queries == 0) continue;
    const Tensor x_NTS = scores_NTS(flash, s, heads_NTH(q_GNH, s.query, s.queries),
                                    heads_NTH(k_GKH, s.key, s.keys, repeat));
    const Tensor lse_NT = x_NTS.logsumexp(2);
    const Tensor sees_NT1 = lse_NT.isfinite().unsqueeze(2);
    const Tensor p_NTS = at::where(sees_NT1, (x_NTS - lse_NT.unsqueeze(2)).exp(), 0.0);
    out_GNH.narrow(0, s.query, s.queries)
        .copy_(at::matmul(p_NTS, heads_NTH(v_GKH, s.key, s.keys, repeat)).transpose(0, 1));
    lse_NG.narrow(1, s.query, s.queries)
        .copy_(at::where(lse_NT.isfinite(), lse_NT, std::numeric_limits<float>::infinity()));
  }
  const Tensor lse = q.dim() == 3
                         ? lse_NG
                         : lse_NG.view({heads, q.size(0), q.size(1)}).transpose(0, 1).contiguous();
  const Tensor state = at::zeros({2}, at::kUInt64), nothing = at::zeros({}, at::kUInt64);
  return {out, lse, state, nothing, at::empty({0}, q.options())};
}

// Of all tokens.
struct Flat {
  Tensor q_GNH, k_GKH, v_GKH;
};
struct Seen {
  Tensor out_GNH, grad_GNH, lse_NG;
};

// Rows of one sequence, summed over the heads that share them.
void write(const Tensor& x_GKH, int64_t first, const Tensor& x_NTH) {
  const int64_t tokens = x_NTH.size(1), own = x_GKH.size(1);
  const Tensor summed = x_NTH.view({own, x_NTH.size(0) / own, tokens, x_NTH.size(2)}).sum(1);
  x_GKH.narrow(0, first, tokens).copy_(summed.transpose(0, 1));
}

void sequence_backward(const Flash& flash, const Sequence& s, const Flat& in, const Seen& seen,
                       const Flat& into) {
  const int64_t repeat = in.q_GNH.size(1) / in.k_GKH.size(1);
  const auto queries = [&](const Tensor& x_GNH) { return heads_NTH(x_GNH, s.query, s.queries); };
  const Tensor q_NTH = queries(in.q_GNH), g_NTH = queries(seen.grad_GNH);
  const Tensor k_NSH = heads_NTH(in.k_GKH, s.key, s.keys, repeat),
               v_NSH = heads_NTH(in.v_GKH, s.key, s.keys, repeat);
  const Tensor lse_NT1 = seen.lse_NG.narrow(1, s.query, s.queries).unsqueeze(2);
  const Tensor p_NTS = (scores_NTS(flash, s, q_NTH, k_NSH) - lse_NT1).exp();
  const Tensor delta_NT1 = (g_NTH * queries(seen.out_GNH)).sum(2, true);
  const Tensor ds_NTS =
      p_NTS * (at::matmul(g_NTH, v_NSH.transpose(1, 2)) - delta_NT1) * flash.scale;
  write(into.q_GNH, s.query, at::matmul(ds_NTS, k_NSH));
  write(into.k_GKH, s.key, at::matmul(ds_NTS.transpose(1, 2), q_NTH));
  write(into.v_GKH, s.key, at::matmul(p_NTS.transpose(1, 2), g_NTH));
}

// The kernels read it by its layout.
Tensor checked_lse_NG(const Tensor& lse, const Tensor& q) {
  const bool is_flat = q.dim() == 3;
  const int64_t heads = q.size(-2);
  TORCH_CHECK(lse.is_contiguous() && lse.scalar_type() == at::kFloat &&
                  lse.sizes() == (is_flat ? at::IntArrayRef({heads, q.size(0)})
                                          : at::IntArrayRef({q.size(0), heads, q.size(1)})),
              "FlashAttention: a log-sum-exp of ", lse.sizes(), ", strides ", lse.strides());
  return is_flat ? lse : lse.transpose(0, 1).reshape({heads, -1});
}

int64_t rounded(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Sums in fp32 have room for whole blocks; with deterministic algorithms there are as many as bring
// work to all multiprocessors. Grouped heads have gradients of their own.
void hold_backward_memory(const Tensor& q, const Tensor& k, const Tensor& starts_q) {
  constexpr int64_t kMultiprocessors = 132, kFloat = 4, kNarrow = 2, kBlock = 128;
  const int64_t heads = q.size(-2), head = q.size(-1);
  int64_t sequences = q.size(0), queries = q.size(0) * rounded(q.size(1), kBlock);
  if (q.dim() == 3) {
    sequences = starts_q.numel() - 1;
    queries = q.size(0) + kBlock * sequences;
  }
  int64_t sums = 1;
  if (at::globalContext().deterministicAlgorithms())
    sums = rounded(kMultiprocessors, sequences * heads) / (sequences * heads);
  std::vector<int64_t> bytes{
      q.numel() * kNarrow, k.numel() * kNarrow, k.numel() * kNarrow, queries * heads * kFloat,
      sums * queries * heads * rounded(head, head <= 128 ? 32 : 64) * kFloat};
  const int64_t expanded = k.numel() / k.size(-2) * heads * kNarrow;
  if (k.size(-2) != heads) bytes.insert(bytes.end(), {expanded, expanded});
  hold_at_once(bytes);
}

using Backward = std::tuple<Tensor, Tensor, Tensor>;
Backward flash_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& out, const Tensor& lse, const Tensor& starts_q,
                        const Tensor& starts_k, int64_t max_q, int64_t max_k, double dropout,
                        bool causal, const Tensor&, const Tensor&, std::optional<double> scale,
                        std::optional<int64_t> left, std::optional<int64_t> right) {
  TORCH_CHECK(dropout == 0, "FlashAttention: not imitated");
  check_inputs(q, k, v);
  check_inputs(q, grad.contiguous(), out.contiguous());
  const Flash flash =
      make_flash(q, k, starts_q, starts_k, max_q, max_k, causal, scale, left, right);
  const Flat in{tokens_GNH(q), tokens_GNH(k), tokens_GNH(v)};
  const Seen seen{tokens_GNH(out), tokens_GNH(grad), checked_lse_NG(lse, q)};
  const Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
               dv = at::empty(v.sizes(), v.options());
  const Flat into{tokens_GNH(dq), tokens_GNH(dk), tokens_GNH(dv)};
  hold_backward_memory(q, k, starts_q);
  // Keys without queries get gradients of 0, and queries without keys.
  for (const Sequence& s : flash.sequences)
    if (s.queries + s.keys > 0) sequence_backward(flash, s, in, seen, into);
  return {dq, dk, dv};
}

// Grouped products: rows of the first factor by a weight for each group, or the weights' gradients.

// Strides that TMA takes: one side lies together, the other is whole 16 bytes apart.
void check_grouped_factor(const Tensor& x) {
  const int64_t step = 16 / static_cast<int64_t>(x.element_size());
  const int64_t rows = x.size(-2), columns = x.size(-1);
  TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
              "_grouped_mm: data is not aligned to 16 bytes");
  const bool by_columns = x.stride(-2) == 1 && x.stride(-1) >= std::max<int64_t>(1, rows);
  const bool by_rows = x.stride(-1) == 1 && x.stride(-2) >= std::max<int64_t>(1, columns);
  TORCH_CHECK(by_columns || by_rows, "_grouped_mm: strides of ", x.strides());
  TORCH_CHECK(x.stride(by_columns ? -1 : -2) % step == 0,
              "_grouped_mm: strides should be multiples of 16 bytes, are ", x.strides());
}

void check_grouped(const Tensor& a, const Tensor& b, const Tensor& ends) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() &&
                  (a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kDouble),
              "_grouped_mm: the host would wait for ", a.scalar_type(), " and ", b.scalar_type());
  TORCH_CHECK(a.dim() == 2 && (b.dim() == 2 || b.dim() == 3), "_grouped_mm: not imitated");
  check_grouped_factor(a);
  check_grouped_factor(b);
  TORCH_CHECK(ends.dim() == 1 && ends.scalar_type() == at::kInt && ends.is_contiguous() &&
                  ends.numel() < 1024,
              "_grouped_mm: offsets of ", ends.sizes(), " of ", ends.scalar_type());
  if (b.dim() == 3) {
    TORCH_CHECK(a.size(1) == b.size(1) && a.stride(1) == 1 && ends.numel() == b.size(0) &&
                    b.stride(0) * static_cast<int64_t>(b.element_size()) % 16 == 0,
                "_grouped_mm: ", a.sizes(), " and ", b.sizes());
  } else {  // groups without rows stop the kernel in every other layout
    TORCH_CHECK(a.size(1) == b.size(0) && a.stride(0) == 1 && b.stride(1) == 1,
                "_grouped_mm: ", a.sizes(), " and ", b.sizes());
  }
}

// What no group covers stays unwritten.
Tensor grouped_mm(const Tensor& a, const Tensor& b, const MaybeTensor& ends,
                  const MaybeTensor& bias, std::optional<at::ScalarType> type) {
  TORCH_CHECK(ends && !bias && (!type || type == a.scalar_type()), "_grouped_mm: not imitated");
  check_grouped(a, b, *ends);
  const bool by_weights = b.dim() == 3;
  const auto wide = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor out = at::full(by_weights ? at::IntArrayRef({a.size(0), b.size(2)})
                                         : at::IntArrayRef({ends->numel(), a.size(0), b.size(1)}),
                              std::numeric_limits<double>::quiet_NaN(), a.options());
  int64_t first = 0;
  for (int64_t g = 0; g < ends->numel(); ++g) {
    const int64_t count = ends->const_data_ptr<int32_t>()[g] - first;
    TORCH_CHECK(count >= 0 && first + count <= (by_weights ? a.size(0) : b.size(0)),
                "_grouped_mm: a group of ", count, " rows from ", first);
    const Tensor of_a = a.narrow(by_weights ? 0 : 1, first, count).to(wide);
    const Tensor of_b = (by_weights ? b[g] : b.narrow(0, first, count)).to(wide);
    (by_weights ? out.narrow(0, first, count) : out[g]).copy_(at::mm(of_a, of_b));
    first += count;
  }
  ++grouped_calls;
  return out;
}

template <class Fn>
c10::KernelFunction kernel(Fn) {
  return c10::KernelFunction::makeFromUnboxedFunction(Fn());
}

}  // namespace

const c10::KernelFunction* gpu_op(const c10::OperatorName& name) {
  static const auto* const kernels = new std::map<std::string, c10::KernelFunction>{
      {"aten::mm.dtype_out", kernel(TORCH_FN(mm_wide))},
      {"aten::addmm.dtype_out", kernel(TORCH_FN(addmm_wide))},
      {"aten::baddbmm.dtype_out", kernel(TORCH_FN(baddbmm_wide))},
      {"aten::_grouped_mm", kernel(TORCH_FN(grouped_mm))},
      {"aten::_flash_attention_forward", kernel(TORCH_FN(flash_forward))},
      {"aten::_flash_attention_backward", kernel(TORCH_FN(flash_backward))},
      {"aten::_efficient_attention_forward", efficient_attention_forward()},
      {"aten::_efficient_attention_backward", efficient_attention_backward()}};
  const auto found = kernels->find(toString(name));
  return found == kernels->end() ? nullptr : &found->second;
}

}  // namespace fake

int64_t calls_with_lengths() { return fake::calls + fake::efficient_calls_with_lengths(); }
int64_t grouped_products() { return fake::grouped_calls; }
int64_t batched_products() { return fake::batched_calls; }

}  // namespace capstan::test
