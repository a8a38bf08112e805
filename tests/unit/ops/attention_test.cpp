// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "capstan/base/error.h"
#include "capstan/device/isa.h"
#include "capstan/device/threads.h"
#include "capstan/ops/path.h"
#include "ops/attention_internal.h"
#include "ops/cpu/attention_kernels.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

// As in a run, before several threads compute.
class VectorMath : public ::testing::Environment {
  void SetUp() override { device::prepare_vector_math(); }
};
const auto* const vector_math = ::testing::AddGlobalTestEnvironment(new VectorMath);

using attention_forms::Call;
using attention_forms::Form;
using testing::normal;

struct Shape {
  int64_t batch, queries, keys, heads, key_heads, size;
};

Call make_call(const Shape& s, at::ScalarType dtype, AttentionMask mask = {}) {
  return {normal({s.batch, s.queries, s.heads, s.size}, 1, dtype),
          normal({s.batch, s.keys, s.key_heads, s.size}, 2, dtype),
          normal({s.batch, s.keys, s.key_heads, s.size}, 3, dtype),
          1 / std::sqrt(static_cast<double>(s.size)), mask};
}

// Documents of a few lengths, other ones in each sample.
Tensor documents(int64_t batch, int64_t tokens) {
  const Tensor first = at::zeros({batch, tokens}, at::kInt);
  auto f = first.accessor<int32_t, 2>();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0, start = 0; t < tokens; ++t) {
      if (t > 0 && (t * 7 + b * 3) % 29 == 0) start = t;
      f[b][t] = static_cast<int32_t>(start);
    }
  return first;
}

std::vector<AttentionMask> masks_for(const Shape& s) {
  std::vector<AttentionMask> masks;
  for (const int64_t offset : {s.keys - s.queries, s.keys - s.queries - 3})
    for (const int64_t window : {0, 1, 20})
      for (const bool separate : {false, true}) {
        AttentionMask mask{.query_offset = offset};
        if (window > 0) mask.sliding_window = window;
        if (separate) mask.first_key_BT = documents(s.batch, s.queries);
        masks.push_back(mask);
      }
  return masks;
}

// What this processor can run of the kernels' compilations.
std::vector<std::pair<device::Isa, const cpu::AttentionKernels*>> kernels_here() {
  std::vector<std::pair<device::Isa, const cpu::AttentionKernels*>> list = {
      {device::Isa::kPlain, &cpu::attention_plain},
      {device::Isa::kAvx2, &cpu::attention_avx2},
      {device::Isa::kAvx512, &cpu::attention_avx512},
      {device::Isa::kAvx512Bf16, &cpu::attention_avx512bf16},
      {device::Isa::kAmx, &cpu::attention_amx}};
  std::erase_if(list, [](const auto& entry) { return entry.first > device::detect_isa(); });
  return list;
}

void compare_forms(const Shape& s, at::ScalarType dtype, const AttentionMask& mask,
                   const cpu::AttentionKernels* kernels = nullptr) {
  Call call = make_call(s, dtype, mask);
  call.kernels = kernels;
  const AttentionParts want = attention_forms::forward(Form::kReference, call);
  const AttentionParts got = attention_forms::forward(Form::kKernel, call);
  ASSERT_TRUE(testing::near(got.out_BTNH, want.out_BTNH));
  const auto fp = dtype == at::kDouble ? at::kDouble : at::kFloat;
  ASSERT_TRUE(testing::near(got.lse_BNT, want.lse_BNT, testing::tolerance_of(fp)));
  const Tensor grad = normal(want.out_BTNH.sizes(), 4, dtype);
  const auto fresh = [&] {
    return AttentionGrads{at::full_like(call.q_BTNH, 7), at::full_like(call.k_BSKH, 7),
                          at::full_like(call.v_BSKH, 7)};
  };
  const AttentionGrads a = fresh(), b = fresh();
  attention_forms::backward(Form::kKernel, call, grad, want, a);
  attention_forms::backward(Form::kReference, call, grad, want, b);
  // Where a query sees one key its gradient is a difference of equal numbers near 1: absolute, not
  // relative to the result.
  const auto scale = [](const Tensor& x) { return std::max(1.0, x.abs().max().item<double>()); };
  const auto t = testing::tolerance_of(dtype);
  ASSERT_TRUE(testing::near(a.q_BTNH, b.q_BTNH, {t.rtol, t.atol * scale(b.q_BTNH)}));
  ASSERT_TRUE(testing::near(a.k_BSKH, b.k_BSKH, {t.rtol, t.atol * scale(b.k_BSKH)}));
  ASSERT_TRUE(testing::near(a.v_BSKH, b.v_BSKH, {t.rtol, t.atol * scale(b.v_BSKH)}));
}

TEST(Attention, KernelMatchesReference_ShapesMasksDtypes) {
  for (const Shape& s :
       {Shape{2, 70, 70, 4, 2, 16}, Shape{1, 33, 33, 2, 2, 8}, Shape{1, 5, 61, 6, 2, 24},
        Shape{2, 1, 40, 4, 1, 64}, Shape{1, 130, 130, 3, 1, 40}, Shape{1, 1, 1, 1, 1, 8}})
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
      for (const AttentionMask& mask : masks_for(s)) {
        SCOPED_TRACE(fmt::format("T {} S {} N {} K {} H {} {} offset {} window {} documents {}",
                                 s.queries, s.keys, s.heads, s.key_heads, s.size,
                                 at::toString(dtype), mask.query_offset,
                                 mask.sliding_window.value_or(0), mask.first_key_BT.defined()));
        compare_forms(s, dtype, mask);
        if (HasFatalFailure()) return;
      }
}

TEST(Attention, EveryInstructionSetMatchesReference) {
  for (const auto& [isa, kernels] : kernels_here())
    for (const Shape& s : {Shape{1, 5, 61, 6, 2, 24}, Shape{1, 65, 97, 2, 1, 64}})
      for (const auto dtype : {at::kFloat, at::kBFloat16})
        for (const AttentionMask& mask : masks_for(s)) {
          SCOPED_TRACE(fmt::format("{} T {} S {} H {} {} offset {} window {} documents {}",
                                   device::name_of(isa), s.queries, s.keys, s.size,
                                   at::toString(dtype), mask.query_offset,
                                   mask.sliding_window.value_or(0), mask.first_key_BT.defined()));
          compare_forms(s, dtype, mask, kernels);
          if (HasFatalFailure()) return;
        }
}

// Products of bf16 pairs see probabilities rounded to bf16, sums do not: against fp64, the error of
// each result is that of such a rounding.
TEST(Attention, Bf16ErrorIsThatOfOneRounding) {
  const Call narrow = make_call({2, 150, 150, 4, 2, 64}, at::kBFloat16);
  Call wide = narrow;
  for (Tensor* x : {&wide.q_BTNH, &wide.k_BSKH, &wide.v_BSKH}) *x = x->to(at::kDouble);
  const AttentionParts want = attention_forms::forward(Form::kReference, wide);
  const Tensor grad = normal(want.out_BTNH.sizes(), 4, at::kBFloat16);
  const AttentionGrads exact =
      attention_forms::reference_backward(wide, grad.to(at::kDouble), want);
  const auto error = [](const Tensor& got, const Tensor& want_) {
    return ((got.to(at::kDouble) - want_).norm() / want_.norm()).item<double>();
  };
  for (const auto& [isa, kernels] : kernels_here()) {
    SCOPED_TRACE(device::name_of(isa));
    Call call = narrow;
    call.kernels = kernels;
    const AttentionParts got = attention_forms::forward(Form::kKernel, call);
    EXPECT_LT(error(got.out_BTNH, want.out_BTNH), 4e-3);
    EXPECT_LT(error(got.lse_BNT, want.lse_BNT), 1e-6);
    const AttentionGrads into{at::empty_like(call.q_BTNH), at::empty_like(call.k_BSKH),
                              at::empty_like(call.v_BSKH)};
    attention_forms::backward(Form::kKernel, call, grad, got, into);
    EXPECT_LT(error(into.q_BTNH, exact.q_BTNH), 8e-3);
    EXPECT_LT(error(into.k_BSKH, exact.k_BSKH), 8e-3);
    EXPECT_LT(error(into.v_BSKH, exact.v_BSKH), 4e-3);
  }
}

TEST(Attention, OddHeadSizesAreExactToo) {
  for (const int64_t size : {1, 3, 7, 20, 100})
    compare_forms({1, 50, 50, 2, 1, size}, at::kFloat, {});
}

TEST(Attention, FewTasksAreSplitOverThreads) {
  const int before = at::get_num_threads();
  at::set_num_threads(5);
  compare_forms({1, 200, 200, 2, 1, 16}, at::kDouble, {});
  compare_forms({1, 200, 200, 4, 2, 16}, at::kFloat, {.first_key_BT = documents(1, 200)});
  for (const auto& [isa, kernels] : kernels_here())
    compare_forms({1, 300, 300, 4, 2, 16}, at::kBFloat16, {}, kernels);
  at::set_num_threads(before);
}

TEST(Attention, MatchesLibTorchOnJoinedRows) {
  for (const auto dtype : {at::kDouble, at::kFloat}) {
    const Call call = make_call({2, 96, 96, 4, 2, 32}, dtype);
    const AttentionParts want = attention_forms::forward(Form::kLibTorch, call);
    const AttentionParts got = attention_forms::forward(Form::kKernel, call);
    EXPECT_TRUE(testing::near(got.out_BTNH, want.out_BTNH));
    EXPECT_TRUE(testing::near(got.lse_BNT, want.lse_BNT));
  }
}

TEST(Attention, FormsAreChosenByDtypeAndPath) {
  const Tensor q = at::empty({1, 4, 2, 8}, at::kHalf), f = at::empty({1, 4, 2, 8}, at::kFloat);
  EXPECT_EQ(attention_forms::choose(f, f, {}), Form::kKernel);
  EXPECT_EQ(attention_forms::choose(q, q, {}), Form::kLibTorch);
  EXPECT_EQ(attention_forms::choose(q, q, {.sliding_window = 2}), Form::kReference);
  const PathGuard guard(Path::kReference);
  EXPECT_EQ(attention_forms::choose(f, f, {}), Form::kReference);
}

TEST(Attention, MergedGradientMatchesDifferences) {
  const AttentionHeads heads{4, 2, 6, 0.37};
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    for (const AttentionMask& mask : {AttentionMask{}, AttentionMask{.sliding_window = 4},
                                      AttentionMask{.first_key_BT = documents(2, 9)}}) {
      const Tensor qkv = leaf(normal({2, 9, 48}, 1)), w = normal({2, 9, 24}, 2);
      run_backward(attention(qkv, heads, mask), w);
      const auto loss = [&] {
        at::NoGradGuard no_grad;
        return weighted_sum(attention(qkv, heads, mask), w);
      };
      EXPECT_TRUE(testing::is_gradient(loss, qkv.detach(), qkv.grad(), 90));
    }
  }
}

TEST(Attention, DocumentsEqualSeparateRuns) {
  const AttentionHeads heads{4, 2, 8, 0.3};
  const int64_t lengths[] = {50, 1, 77, 22};
  const Tensor qkv = leaf(normal({1, 150, 64}, 1)), w = normal({1, 150, 32}, 2);
  const Tensor first = at::zeros({1, 150}, at::kInt);
  std::vector<Tensor> outs, grads;
  int64_t start = 0;
  for (const int64_t length : lengths) {
    first.narrow(1, start, length).fill_(start);
    const Tensor alone = leaf(qkv.detach().narrow(1, start, length));
    const Tensor out = attention(alone, heads, {});
    run_backward(out, w.narrow(1, start, length));
    outs.push_back(out);
    grads.push_back(alone.grad());
    start += length;
  }
  const Tensor out = attention(qkv, heads, {.first_key_BT = first});
  run_backward(out, w);
  EXPECT_TRUE(testing::near(out, at::cat(outs, 1)));
  EXPECT_TRUE(testing::near(qkv.grad(), at::cat(grads, 1)));
}

TEST(Attention, QueriesWithoutKeysGiveZero) {
  for (const Form form : {Form::kKernel, Form::kReference}) {
    const Call call = make_call({1, 6, 6, 2, 1, 8}, at::kFloat, {.query_offset = -3});
    const AttentionParts parts = attention_forms::forward(form, call);
    EXPECT_TRUE(at::equal(parts.out_BTNH.narrow(1, 0, 3), at::zeros({1, 3, 2, 8})));
    EXPECT_TRUE((parts.lse_BNT.narrow(2, 0, 3) == -std::numeric_limits<double>::infinity())
                    .all()
                    .item<bool>());
    EXPECT_TRUE(at::isfinite(parts.lse_BNT.narrow(2, 3, 3)).all().item<bool>());
    const AttentionGrads into{at::empty_like(call.q_BTNH), at::empty_like(call.k_BSKH),
                              at::empty_like(call.v_BSKH)};
    attention_forms::backward(form, call, normal({1, 6, 2, 8}, 4, at::kFloat), parts, into);
    EXPECT_TRUE(at::equal(into.q_BTNH.narrow(1, 0, 3), at::zeros({1, 3, 2, 8})));
    EXPECT_TRUE(at::equal(into.k_BSKH.narrow(1, 3, 3), at::zeros({1, 3, 1, 8})));
    EXPECT_TRUE(at::isfinite(into.v_BSKH).all().item<bool>());
  }
}

// Blocks of keys merged by log-sum-exp, and backward per block with the merged numbers: what a ring
// does.
TEST(Attention, BlocksOfKeysMergeToTheWhole) {
  const Call whole = make_call({1, 40, 40, 4, 2, 8}, at::kDouble);
  const AttentionParts want =
      attention_forward(whole.q_BTNH, whole.k_BSKH, whole.v_BSKH, whole.scale, {});
  const Tensor grad = normal({1, 40, 4, 8}, 4);
  Tensor out = at::zeros_like(want.out_BTNH), dq = at::zeros_like(whole.q_BTNH);
  std::vector<Tensor> dk, dv;
  for (const int64_t begin : {0, 25}) {
    const int64_t count = begin == 0 ? 25 : 15;
    const Tensor k = whole.k_BSKH.narrow(1, begin, count), v = whole.v_BSKH.narrow(1, begin, count);
    const AttentionMask mask{.query_offset = -begin};
    const AttentionParts part = attention_forward(whole.q_BTNH, k, v, whole.scale, mask);
    out = out + part.out_BTNH * (part.lse_BNT - want.lse_BNT).exp().transpose(1, 2).unsqueeze(-1);
    const AttentionGrads into{at::empty_like(dq), at::empty_like(k), at::empty_like(v)};
    attention_backward(grad, {whole.q_BTNH, k, v}, want, whole.scale, mask, into);
    dq = dq + into.q_BTNH;
    dk.push_back(into.k_BSKH);
    dv.push_back(into.v_BSKH);
  }
  EXPECT_TRUE(testing::near(out, want.out_BTNH));
  const AttentionGrads g{at::empty_like(dq), at::empty_like(whole.k_BSKH),
                         at::empty_like(whole.v_BSKH)};
  attention_backward(grad, {whole.q_BTNH, whole.k_BSKH, whole.v_BSKH}, want, whole.scale, {}, g);
  EXPECT_TRUE(testing::near(dq, g.q_BTNH));
  EXPECT_TRUE(testing::near(at::cat(dk, 1), g.k_BSKH));
  EXPECT_TRUE(testing::near(at::cat(dv, 1), g.v_BSKH));
}

TEST(Attention, StridedHeadsAreRead) {
  const Tensor base = normal({2, 3, 8, 20}, 1, at::kFloat);  // [B, N, H, T]
  const Tensor q = base.permute({0, 3, 1, 2}), k = q.narrow(2, 0, 1), v = q.narrow(2, 1, 1);
  const AttentionParts a = attention_forward(q, k, v, 0.3, {});
  const AttentionParts b =
      attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), 0.3, {});
  EXPECT_TRUE(at::equal(a.out_BTNH, b.out_BTNH));
}

TEST(Attention, WrongShapesAreRefused) {
  EXPECT_THROW((void)attention(normal({1, 2, 10}, 1), {1, 1, 4, 1.0}, {}), InternalError);
  const Tensor q = normal({1, 4, 3, 8}, 1), k = normal({1, 4, 2, 8}, 2);
  EXPECT_THROW((void)attention_forward(q, k, k, 1, {}), InternalError);
  EXPECT_THROW((void)attention_forward(k, k, k, 1, {.sliding_window = 0}), InternalError);
  EXPECT_THROW((void)attention_forward(k, k, k, 1, {.first_key_BT = at::zeros({1, 4}, at::kLong)}),
               InternalError);
}

}  // namespace
}  // namespace capstan::ops
