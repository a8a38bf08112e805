// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// FlashAttention on a device, and in fp32 the memory-efficient kernel, against plain math in fp32
// on the CPU: bands, windows and documents. Legend: B samples, T tokens, N query heads, K key/value
// heads, H head size.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "capstan/device/accelerator.h"
#include "ops/attention_internal.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using attention_forms::Call;
using attention_forms::Form;
using testing::normal;

struct Shape {
  int64_t batch, queries, keys, heads, key_heads, size;
};

Call make_call(const Shape& s, at::ScalarType dtype, AttentionMask mask) {
  return {normal({s.batch, s.queries, s.heads, s.size}, 1, dtype),
          normal({s.batch, s.keys, s.key_heads, s.size}, 2, dtype),
          normal({s.batch, s.keys, s.key_heads, s.size}, 3, dtype),
          1 / std::sqrt(static_cast<double>(s.size)), std::move(mask)};
}

Tensor on_device(const Tensor& x) { return x.defined() ? x.to(device::run_device()) : x; }
Tensor plain(const Tensor& x) { return x.to(at::kCPU, at::kFloat); }

Call on_device(Call call) {
  call.mask.first_key_BT = on_device(call.mask.first_key_BT);
  call.mask.documents.starts = on_device(call.mask.documents.starts);
  call.mask.query_starts = on_device(call.mask.query_starts);
  return {on_device(call.q_BTNH), on_device(call.k_BSKH), on_device(call.v_BSKH), call.scale,
          call.mask};
}

Call in_fp32(Call call) {
  return {plain(call.q_BTNH), plain(call.k_BSKH), plain(call.v_BSKH), call.scale, call.mask};
}

struct Results {
  AttentionParts parts;
  AttentionGrads grads;
};
Results run(Form form, const Call& call, const Tensor& grad) {
  Results r{
      attention_forms::forward(form, call),
      {at::empty_like(call.q_BTNH), at::empty_like(call.k_BSKH), at::empty_like(call.v_BSKH)}};
  attention_forms::backward(form, call, grad, r.parts, r.grads);
  return r;
}

// Sums over keys and heads grow with the numbers in them. Products of fp32 are made of three of
// TF32 on GPUs.
void expect_near(const Tensor& got, const Tensor& want, const char* what) {
  const bool is_fp32 = got.scalar_type() == at::kFloat;
  const auto t = is_fp32 ? testing::Tolerance{1e-4, 1e-5} : testing::tolerance_of(at::kBFloat16);
  const double scale = std::max(1.0, want.abs().max().item<double>());
  EXPECT_TRUE(testing::near(plain(got), want, {t.rtol, t.atol * scale})) << what;
}

void compare(const Call& call, Form form) {
  const Call there = on_device(call);
  ASSERT_EQ(attention_forms::choose(there.q_BTNH, there.k_BSKH, there.mask), form);
  const Tensor grad = normal(call.q_BTNH.sizes(), 4, call.q_BTNH.scalar_type());
  const Results got = run(form, there, on_device(grad));
  const Results want = run(Form::kReference, in_fp32(call), plain(grad));
  expect_near(got.parts.out_BTNH, want.parts.out_BTNH, "out");
  ASSERT_EQ(got.parts.lse_BNT.sizes(), want.parts.lse_BNT.sizes());
  EXPECT_TRUE(testing::near(plain(got.parts.lse_BNT), want.parts.lse_BNT, {1e-4, 1e-4}));
  // Infinities of either sign are near each other.
  EXPECT_TRUE(at::equal(plain(got.parts.lse_BNT).isneginf(), want.parts.lse_BNT.isneginf()));
  expect_near(got.grads.q_BTNH, want.grads.q_BTNH, "gradient of q");
  expect_near(got.grads.k_BSKH, want.grads.k_BSKH, "gradient of k");
  expect_near(got.grads.v_BSKH, want.grads.v_BSKH, "gradient of v");
}

AttentionMask documents(const std::vector<std::vector<int64_t>>& lengths, int64_t tokens) {
  AttentionMask mask;
  const auto rows = static_cast<int64_t>(lengths.size());
  mask.first_key_BT = at::empty({rows, tokens}, at::kInt);
  for (int64_t b = 0; b < rows; ++b) {
    int64_t start = 0;
    for (const int64_t length : lengths[static_cast<size_t>(b)]) {
      mask.first_key_BT[b].narrow(0, start, length).fill_(start);
      start += length;
    }
    EXPECT_EQ(start, tokens);
  }
  mask.documents = param::document_starts(mask.first_key_BT);
  return mask;
}

std::vector<std::vector<std::vector<int64_t>>> divisions() {
  return {{{70}, {70}, {70}},
          {{30, 1, 1, 38}, {70}, {1, 69}},
          {{7, 7, 7, 7, 7, 7, 7, 7, 14}, {35, 35}, {2, 60, 8}},
          {std::vector<int64_t>(70, 1)},
          {{1, 68, 1}}};
}

void compare_documents(const std::vector<std::vector<int64_t>>& division, int64_t window,
                       at::ScalarType dtype, int64_t key_heads) {
  SCOPED_TRACE(fmt::format("{} rows, {} documents in the first, window {}, {}, {} of 4 heads",
                           division.size(), division[0].size(), window, at::toString(dtype),
                           key_heads));
  AttentionMask mask = documents(division, 70);
  if (window > 0) mask.sliding_window = window;
  const auto rows = static_cast<int64_t>(division.size());
  compare(make_call({rows, 70, 70, 4, key_heads, 16}, dtype, mask),
          dtype == at::kFloat ? Form::kEfficientDocuments : Form::kFlashDocuments);
}

TEST(GpuAttention, DocumentsAndWindowsMatchTheReference) {
  for (const auto& division : divisions())
    for (const int64_t window : {0, 1, 5, 200}) {
      compare_documents(division, window, at::kBFloat16, 2);
      if (window == 0 || window == 5) compare_documents(division, window, at::kFloat, 2);
      if (HasFailure()) return;
    }
  for (const int64_t key_heads : {1, 4})
    for (const int64_t window : {0, 5})
      compare_documents(divisions()[1], window, at::kHalf, key_heads);
}

// Queries of one chunk of each row and keys of another, or of the same.
struct Part {
  int64_t queries, keys;  // chunks
};
constexpr int64_t kChunk = 16, kChunks = 4;

AttentionMask part_of(const std::vector<std::vector<int64_t>>& division, const Part& part) {
  const AttentionMask rows = documents(division, kChunks * kChunk);
  const Tensor chunks_CE = param::chunk_starts(rows.documents.starts, kChunks * kChunk, kChunks);
  AttentionMask mask{.query_offset = (part.queries - part.keys) * kChunk};
  mask.first_key_BT =
      (rows.first_key_BT.narrow(1, part.queries * kChunk, kChunk) - part.keys * kChunk)
          .contiguous();
  mask.documents = {chunks_CE[part.keys], std::min(rows.documents.longest, kChunk), {}};
  if (part.queries != part.keys) mask.query_starts = chunks_CE[part.queries];
  return mask;
}

// Of the kernel for fp32 the diagonal ones alone, of windows that cut a part the same.
void compare_parts(const std::vector<std::vector<int64_t>>& division, int64_t window,
                   at::ScalarType dtype) {
  const auto rows = static_cast<int64_t>(division.size());
  const bool is_fp32 = dtype == at::kFloat;
  for (int64_t q = 0; q < kChunks; ++q)
    for (int64_t k = 0; k <= q; ++k) {
      SCOPED_TRACE(fmt::format("{} documents in the first row, queries of chunk {}, keys of {}, {}",
                               division[0].size(), q, k, at::toString(dtype)));
      AttentionMask mask = part_of(division, {q, k});
      if (window > 0) mask.sliding_window = window;
      const bool is_cut = window > 0 && window < (q - k + 1) * kChunk;
      Form form = is_fp32 ? Form::kEfficientDocuments : Form::kFlashDocuments;
      if (q != k && (is_fp32 || is_cut)) form = Form::kReference;
      compare(make_call({rows, kChunk, kChunk, 4, 2, 16}, dtype, mask), form);
    }
}

TEST(GpuAttention, PartsOfDocumentsMatchTheReference) {
  const std::vector<std::vector<std::vector<int64_t>>> divisions = {
      {{64}},
      {{20, 44}, {64}},
      {{16, 16, 16, 16}, {17, 30, 17}, {1, 1, 62}},
      {std::vector<int64_t>(64, 1), {63, 1}},
      {{5, 7, 3, 20, 2, 2, 25}, {40, 24}}};
  for (const auto& division : divisions)
    for (const int64_t window : {0, 5, 30, 64})
      for (const auto dtype : {at::kBFloat16, at::kFloat}) {
        compare_parts(division, window, dtype);
        if (HasFailure()) return;
      }
}

// More places than documents, and room for longer ones: the same numbers.
void expect_padding_changes_nothing(at::ScalarType dtype, Form form) {
  const AttentionMask mask = documents({{20, 30, 20}, {50, 20}}, 70);
  const Call call = on_device(make_call({2, 70, 70, 4, 2, 16}, dtype, mask));
  const Tensor grad = on_device(normal({2, 70, 4, 16}, 4, dtype));
  Call padded = call;
  padded.mask.documents = {at::cat({call.mask.documents.starts,
                                    at::full({20}, 140, call.mask.documents.starts.options())}),
                           70,
                           {}};
  const Results a = run(form, call, grad), b = run(form, padded, grad);
  EXPECT_TRUE(at::equal(a.parts.out_BTNH, b.parts.out_BTNH));
  EXPECT_TRUE(at::equal(a.parts.lse_BNT, b.parts.lse_BNT));
  EXPECT_TRUE(at::equal(a.grads.k_BSKH, b.grads.k_BSKH));
  EXPECT_TRUE(at::equal(a.grads.v_BSKH, b.grads.v_BSKH));
  // On a GPU the gradient of queries is summed in any order.
  expect_near(a.grads.q_BTNH, plain(b.grads.q_BTNH), "gradient of q");
}
TEST(GpuAttention, PaddedStartsChangeNothing) {
  expect_padding_changes_nothing(at::kBFloat16, Form::kFlashDocuments);
  expect_padding_changes_nothing(at::kFloat, Form::kEfficientDocuments);
}

TEST(GpuAttention, BandsMatchTheReference) {
  int flash = 0;
  for (const Shape& s : {Shape{2, 40, 40, 4, 2, 16}, Shape{1, 9, 61, 6, 2, 24},
                         Shape{2, 33, 20, 4, 4, 8}, Shape{1, 1, 40, 4, 1, 64}})
    for (const int64_t offset : {-3, 0, 20, 52, 100})
      for (const int64_t window : {0, 1, 20, 60}) {
        AttentionMask mask{.query_offset = offset};
        if (window > 0) mask.sliding_window = window;
        const Call call = make_call(s, at::kBFloat16, mask);
        if (!flash_band(attention_forms::case_of(call.q_BTNH, call.k_BSKH, mask))) continue;
        SCOPED_TRACE(
            fmt::format("T {} S {} offset {} window {}", s.queries, s.keys, offset, window));
        compare(call, Form::kFlash);
        ++flash;
      }
  EXPECT_GT(flash, 20);
}

TEST(GpuAttention, Fp32MatchesTheReference) {
  int efficient = 0;
  for (const Shape& s :
       {Shape{2, 40, 40, 4, 2, 16}, Shape{1, 9, 61, 6, 2, 24}, Shape{2, 33, 20, 4, 4, 8},
        Shape{1, 1, 40, 4, 1, 64}, Shape{1, 64, 64, 4, 1, 20}, Shape{1, 130, 130, 2, 1, 128}})
    for (const int64_t offset : {-3, 0, 20, 52, 100})
      for (const int64_t window : {0, 1, 20, 60}) {
        AttentionMask mask{.query_offset = offset};
        if (window > 0) mask.sliding_window = window;
        const Call call = make_call(s, at::kFloat, mask);
        if (!efficient_mask(attention_forms::case_of(call.q_BTNH, call.k_BSKH, mask))) continue;
        SCOPED_TRACE(
            fmt::format("T {} S {} offset {} window {}", s.queries, s.keys, offset, window));
        compare(call, Form::kEfficient);
        ++efficient;
      }
  EXPECT_GT(efficient, 20);
}

// A ring hands in parts of the log-sum-exp, which kernels read by the layout of a whole one.
void expect_strides_are_read(at::ScalarType dtype, Form form) {
  const Call call = on_device(make_call({2, 40, 40, 4, 2, 16}, dtype, {}));
  const Tensor grad = on_device(normal({2, 40, 4, 16}, 4, dtype));
  Results a = run(form, call, grad);
  const Tensor longer = at::cat({a.parts.lse_BNT, a.parts.lse_BNT}, 2);
  const AttentionGrads into{at::empty_like(call.q_BTNH), at::empty_like(call.k_BSKH),
                            at::empty_like(call.v_BSKH)};
  attention_forms::backward(form, call, grad, {a.parts.out_BTNH, longer.narrow(2, 0, 40)}, into);
  EXPECT_TRUE(at::equal(into.k_BSKH, a.grads.k_BSKH));
}
TEST(GpuAttention, StridedLogSumExpIsRead) {
  expect_strides_are_read(at::kBFloat16, Form::kFlash);
  expect_strides_are_read(at::kFloat, Form::kEfficient);
}

// Through autograd, q, k and v side by side.
void expect_merged_gradients(at::ScalarType dtype) {
  const AttentionHeads heads{4, 2, 16, 0.25};
  const AttentionMask mask = documents({{12, 28}, {40}}, 40);
  const Tensor qkv = normal({2, 40, 128}, 1, dtype), w = normal({2, 40, 64}, 2);
  const Tensor there = leaf(on_device(qkv)), here = leaf(plain(qkv));
  AttentionMask moved = mask;
  moved.first_key_BT = on_device(mask.first_key_BT);
  moved.documents.starts = on_device(mask.documents.starts);
  const Tensor out = attention(there, heads, moved);
  run_backward(out, on_device(w.to(dtype)));
  const Tensor want = attention(here, heads, mask);
  run_backward(want, w.to(at::kFloat));
  expect_near(out.detach(), want.detach(), "out");
  expect_near(there.grad(), here.grad(), "gradient");
}
TEST(GpuAttention, MergedGradientsOfDocuments) {
  expect_merged_gradients(at::kBFloat16);
  expect_merged_gradients(at::kFloat);
}

}  // namespace
}  // namespace capstan::ops
