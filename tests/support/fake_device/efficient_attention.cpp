// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/efficient_attention.h"

#include <ATen/ATen.h>

#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "support/fake_device/memory.h"

namespace capstan::test::fake {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kRowStep = 32;  // of the log-sum-exp
constexpr int64_t kFromFirst = 1, kToLast = 2;

// One sequence: sample `row`, tokens from `begin`.
struct Sequence {
  int64_t row, query, queries, key, keys;
};
struct Call {
  std::vector<Sequence> sequences;
  int64_t diagonal, window, longest;
  double scale;
};

std::atomic<int64_t> calls = 0;  // of the forward with lengths

int64_t padded(int64_t queries) { return (queries + kRowStep - 1) / kRowStep * kRowStep; }

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && q.scalar_type() != at::kDouble, "efficient attention: ", q.dim(),
              " dimensions of ", q.scalar_type());
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == q.size(0) && k.size(2) == q.size(2) &&
                  k.size(3) == q.size(3),
              "efficient attention: heads that differ: ", q.sizes(), ", ", k.sizes());
  for (const Tensor& x : {q, k, v})
    TORCH_CHECK(x.scalar_type() == q.scalar_type() && x.stride(3) == 1 && x.stride(2) % 4 == 0 &&
                    x.stride(1) % 4 == 0 && x.size(3) % 4 == 0,
                "efficient attention: strides ", x.strides(), " of ", x.sizes());
}

std::vector<Sequence> cumulated(const Tensor& q, const Tensor& k, const Tensor& starts_q,
                                const Tensor& starts_k, int64_t max_q, int64_t max_k) {
  for (const Tensor& x : {starts_q, starts_k})
    TORCH_CHECK(x.scalar_type() == at::kInt && x.dim() == 1 && x.is_contiguous() && x.numel() > 1,
                "efficient attention: cu_seqlens");
  TORCH_CHECK(q.size(0) == 1 && starts_q.numel() == starts_k.numel(),
              "efficient attention: lengths are of one row");
  TORCH_CHECK(max_q > 0 && max_q <= q.size(1) && max_k > 0 && max_k <= k.size(1),
              "efficient attention: longest ", max_q, " and ", max_k);
  std::vector<Sequence> list;
  const auto* const s_q = starts_q.const_data_ptr<int32_t>();
  const auto* const s_k = starts_k.const_data_ptr<int32_t>();
  for (int64_t i = 0; i + 1 < starts_q.numel(); ++i) {
    list.push_back({0, s_q[i], s_q[i + 1] - s_q[i], s_k[i], s_k[i + 1] - s_k[i]});
    TORCH_CHECK(list.back().queries <= max_q && list.back().keys <= max_k,
                "efficient attention: a sequence of ", list.back().queries, ", at most ", max_q);
  }
  return list;
}

Call make_call(const Tensor& q, const Tensor& k, const MaybeTensor& starts_q,
               const MaybeTensor& starts_k, int64_t max_q, int64_t max_k, int64_t diagonal,
               const std::optional<double>& scale, const std::optional<int64_t>& window) {
  TORCH_CHECK(diagonal >= 0 && diagonal <= kToLast, "efficient attention: mask ", diagonal);
  TORCH_CHECK(window.value_or(0) == 0 || diagonal != 0, "efficient attention: a window alone");
  Call call{{}, diagonal, window.value_or(0), q.size(1), scale.value()};
  if (starts_q && starts_q->defined()) {
    call.sequences = cumulated(q, k, *starts_q, *starts_k, max_q, max_k);
    call.longest = max_q;
    return call;
  }
  for (int64_t b = 0; b < q.size(0); ++b) call.sequences.push_back({b, 0, q.size(1), 0, k.size(1)});
  return call;
}

// fp64, heads in front.
Tensor heads_NTH(const Tensor& x_BTNH, int64_t row, int64_t first, int64_t count) {
  return x_BTNH[row].narrow(0, first, count).to(at::kDouble).transpose(0, 1);
}

// The backward measures windows from the first key, whichever diagonal there is.
Tensor scores_NTS(const Call& call, const Sequence& s, const Tensor& q_NTH, const Tensor& k_NSH,
                  bool is_backward) {
  const Tensor key_S = at::arange(s.keys).unsqueeze(0),
               query_T = at::arange(s.queries).unsqueeze(1);
  const int64_t shift = call.diagonal == kToLast ? s.keys - s.queries : 0;
  Tensor hidden_TS = at::zeros({s.queries, s.keys}, at::kBool);
  if (call.diagonal != 0) hidden_TS = key_S > query_T + shift;
  if (call.window > 0)
    hidden_TS = hidden_TS.logical_or(key_S <= query_T + (is_backward ? 0 : shift) - call.window);
  return at::matmul(q_NTH, k_NSH.transpose(1, 2))
      .mul(call.scale)
      .masked_fill(hidden_TS, -kInfinity);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t>;
Forward forward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias,
                const MaybeTensor& starts_q, const MaybeTensor& starts_k,
                std::optional<int64_t> max_q, std::optional<int64_t> max_k, double dropout,
                int64_t diagonal, bool log_sum, std::optional<double> scale,
                const MaybeTensor& lengths, std::optional<int64_t> window) {
  TORCH_CHECK(dropout == 0 && !bias && !lengths && log_sum, "efficient attention: not imitated");
  check_inputs(q, k, v);
  const Call call = make_call(q, k, starts_q, starts_k, max_q.value_or(q.size(1)),
                              max_k.value_or(k.size(1)), diagonal, scale, window);
  calls += starts_q && starts_q->defined();
  const Tensor out = at::empty(q.sizes(), q.options());
  const auto sequences = static_cast<int64_t>(call.sequences.size());
  const Tensor lse_ENR = at::full({sequences, q.size(2), padded(call.longest)},
                                  std::numeric_limits<float>::quiet_NaN(), at::kFloat);
  for (int64_t e = 0; e < sequences; ++e) {
    const Sequence& s = call.sequences[static_cast<size_t>(e)];
    if (s.queries == 0) continue;
    const Tensor x_NTS = scores_NTS(call, s, heads_NTH(q, s.row, s.query, s.queries),
                                    heads_NTH(k, s.row, s.key, s.keys), false);
    const Tensor lse_NT = x_NTS.logsumexp(2);
    const Tensor sees_NT = lse_NT.isfinite();
    const Tensor p_NTS = at::where(sees_NT.unsqueeze(2), (x_NTS - lse_NT.unsqueeze(2)).exp(), 0.0);
    out[s.row]
        .narrow(0, s.query, s.queries)
        .copy_(at::matmul(p_NTS, heads_NTH(v, s.row, s.key, s.keys)).transpose(0, 1));
    lse_ENR[e].narrow(1, 0, padded(s.queries)).fill_(kInfinity);
    lse_ENR[e].narrow(1, 0, s.queries).copy_(at::where(sees_NT, lse_NT, 0.0));
  }
  const Tensor state = at::zeros({}, at::kLong);
  return {out, lse_ENR, state, state.clone(), call.longest, k.size(1)};
}

// Blocks of 64 queries, of 128 for larger heads, by 64 features, each behind a lock, of every
// sequence as if it were the longest. Before, the product of output and gradient.
void hold_backward_memory(const Call& call, const Tensor& q) {
  constexpr int64_t kFloat = 4, kColumns = 64, kLock = 4;
  const int64_t block = q.size(3) <= 64 ? 64 : 128;
  const int64_t blocks = (call.longest + block - 1) / block,
                columns = (q.size(3) + kColumns - 1) / kColumns;
  const int64_t results = q.numel() * kFloat, delta = q.numel() / q.size(3) * kFloat;
  const auto sequences = static_cast<int64_t>(call.sequences.size());
  hold_at_once({results, results, results, results, delta, delta});
  hold_at_once({results, results, results, delta,
                sequences * q.size(2) * blocks * columns * (block * kColumns + kLock) * kFloat});
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Backward backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                  const MaybeTensor& bias, const Tensor& out, const MaybeTensor& starts_q,
                  const MaybeTensor& starts_k, int64_t max_q, int64_t max_k, const Tensor& lse,
                  double dropout, const Tensor&, const Tensor&, int64_t diagonal, bool bias_grad,
                  std::optional<double> scale, std::optional<int64_t> splits,
                  std::optional<int64_t> window, bool shared) {
  TORCH_CHECK(dropout == 0 && !(bias && bias->defined()) && !bias_grad && !splits && !shared,
              "efficient attention: not imitated");
  check_inputs(q, k, v);
  const Call call = make_call(q, k, starts_q, starts_k, max_q, max_k, diagonal, scale, window);
  const auto sequences = static_cast<int64_t>(call.sequences.size());
  TORCH_CHECK(lse.sizes() == at::IntArrayRef({sequences, q.size(2), padded(call.longest)}) &&
                  lse.stride(2) == 1 && lse.scalar_type() == at::kFloat,
              "efficient attention: a log-sum-exp of ", lse.sizes(), ", strides ", lse.strides());
  const Tensor dq = at::zeros(q.sizes(), q.options()), dk = at::zeros(k.sizes(), k.options()),
               dv = at::zeros(v.sizes(), v.options());
  hold_backward_memory(call, q);
  for (int64_t e = 0; e < sequences; ++e) {
    const Sequence& s = call.sequences[static_cast<size_t>(e)];
    if (s.queries == 0) continue;
    // What is filled up with anything else than infinity would be read.
    TORCH_CHECK(
        lse[e].narrow(1, s.queries, padded(s.queries) - s.queries).eq(kInfinity).all().item<bool>(),
        "efficient attention: a log-sum-exp that is not filled up");
    const auto queries = [&](const Tensor& x) { return heads_NTH(x, s.row, s.query, s.queries); };
    const Tensor q_NTH = queries(q), g_NTH = queries(grad),
                 k_NSH = heads_NTH(k, s.row, s.key, s.keys),
                 v_NSH = heads_NTH(v, s.row, s.key, s.keys);
    const Tensor lse_NT1 = lse[e].narrow(1, 0, s.queries).to(at::kDouble).unsqueeze(2);
    const Tensor p_NTS = (scores_NTS(call, s, q_NTH, k_NSH, true) - lse_NT1).exp();
    const Tensor delta_NT1 = (g_NTH * queries(out)).sum(2, true);
    const Tensor ds_NTS =
        p_NTS * (at::matmul(g_NTH, v_NSH.transpose(1, 2)) - delta_NT1) * call.scale;
    const auto write = [&](const Tensor& to, int64_t first, const Tensor& x_NTH) {
      to[s.row].narrow(0, first, x_NTH.size(1)).copy_(x_NTH.transpose(0, 1));
    };
    write(dq, s.query, at::matmul(ds_NTS, k_NSH));
    write(dk, s.key, at::matmul(ds_NTS.transpose(1, 2), q_NTH));
    write(dv, s.key, at::matmul(p_NTS.transpose(1, 2), g_NTH));
  }
  return {dq, dk, dv, Tensor()};
}

}  // namespace

int64_t efficient_calls_with_lengths() { return calls; }
c10::KernelFunction efficient_attention_forward() {
  return c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(forward));
}
c10::KernelFunction efficient_attention_backward() {
  return c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(backward));
}

}  // namespace capstan::test::fake
