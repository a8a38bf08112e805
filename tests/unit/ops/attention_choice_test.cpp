// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/attention_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace capstan::ops {
namespace {

using ::testing::HasSubstr;
using Form = AttentionForm;

const AttentionCase kOnGpu{.on_cpu = false,
                           .has_flash = true,
                           .dtype = at::kBFloat16,
                           .head_size = 64,
                           .queries = 128,
                           .keys = 128};

AttentionCase changed(void (*change)(AttentionCase&)) {
  AttentionCase c = kOnGpu;
  change(c);
  return c;
}

TEST(AttentionChoice, GpusTakeFlashAttentionWhereItIsRight) {
  EXPECT_EQ(choose_attention(kOnGpu).form, Form::kFlash);
  EXPECT_TRUE(choose_attention(kOnGpu).reason.empty());
  const auto form = [](void (*change)(AttentionCase&)) {
    return choose_attention(changed(change)).form;
  };
  EXPECT_EQ(form([](auto& c) { c.dtype = at::kHalf; }), Form::kFlash);
  EXPECT_EQ(form([](auto& c) { c.sliding_window = 5; }), Form::kFlash);
  EXPECT_EQ(form([](auto& c) { c.head_size = 256; }), Form::kFlash);
  EXPECT_EQ(form([](auto& c) { c.documents = c.has_starts = true; }), Form::kFlashDocuments);
  EXPECT_EQ(form([](auto& c) { c.query_offset = 128; }), Form::kFlash);
  EXPECT_EQ(form([](auto& c) {
              c.documents = c.has_starts = true;
              c.query_offset = 256;
              c.sliding_window = 384;
            }),
            Form::kFlashDocuments);
}

TEST(AttentionChoice, TheReferenceSaysWhyAndWhatToChange) {
  const auto expect = [](void (*change)(AttentionCase&), const char* reason, const char* fix) {
    const AttentionChoice choice = choose_attention(changed(change));
    EXPECT_EQ(choice.form, Form::kReference) << reason;
    EXPECT_THAT(choice.reason, HasSubstr(reason));
    EXPECT_THAT(choice.fix, HasSubstr(fix));
  };
  expect([](auto& c) { c.path = Path::kReference; }, "CAPSTAN_OPS", "Unset");
  expect([](auto& c) { c.has_flash = false; }, "no FlashAttention", "");
  expect([](auto& c) { c.dtype = at::kFloat; }, "not in fp32", "precision.compute: bf16");
  expect([](auto& c) { c.head_size = 20; }, "heads of 20", "model.head_dim");
  expect([](auto& c) { c.head_size = 264; }, "heads of 264", "model.head_dim");
  expect([](auto& c) { c.documents = true; }, "in parts", "parallel.context.method: all_to_all");
  expect(
      [](auto& c) {
        c.documents = c.has_starts = true;
        c.keys = 256;
        c.query_offset = 128;
      },
      "in parts", "data.documents: joined");
  expect(
      [](auto& c) {
        c.documents = c.has_starts = true;
        c.query_offset = 128;
        c.sliding_window = 255;
      },
      "in parts", "data.documents: joined");
  expect([](auto& c) { c.query_offset = -1; }, "see none", "all_to_all");
}

TEST(AttentionChoice, Fp32TakesTheMemoryEfficientKernelWhereItIsRight) {
  AttentionCase base = kOnGpu;
  base.has_efficient = true;
  EXPECT_EQ(choose_attention(base).form, Form::kFlash);
  base.dtype = at::kFloat;
  const auto choice = [&](void (*change)(AttentionCase&)) {
    AttentionCase c = base;
    change(c);
    return choose_attention(c);
  };
  EXPECT_EQ(choice([](auto&) {}).form, Form::kEfficient);
  EXPECT_EQ(choice([](auto& c) { c.has_flash = false; }).form, Form::kEfficient);
  EXPECT_EQ(choice([](auto& c) { c.head_size = 20; }).form, Form::kEfficient);
  EXPECT_EQ(choice([](auto& c) { c.sliding_window = 5; }).form, Form::kEfficient);
  EXPECT_EQ(choice([](auto& c) { c.documents = c.has_starts = true; }).form,
            Form::kEfficientDocuments);
  const auto expect = [&](void (*change)(AttentionCase&), const char* reason, const char* fix) {
    EXPECT_EQ(choice(change).form, Form::kReference) << reason;
    EXPECT_THAT(choice(change).reason, HasSubstr(reason));
    EXPECT_THAT(choice(change).fix, HasSubstr(fix));
  };
  expect([](auto& c) { c.path = Path::kReference; }, "CAPSTAN_OPS", "Unset");
  expect([](auto& c) { c.dtype = at::kDouble; }, "not in fp64", "precision.compute: bf16");
  expect([](auto& c) { c.head_size = 18; }, "multiples of 4", "model.head_dim");
  expect([](auto& c) { c.documents = true; }, "in parts", "all_to_all");
  expect([](auto& c) { c.documents = c.has_starts = true, c.query_offset = 128; }, "in parts",
         "all_to_all");
  expect([](auto& c) { c.query_offset = -1; }, "later start", "all_to_all");
}

TEST(AttentionChoice, CpusTakeTheirOwnKernels) {
  AttentionCase c{.dtype = at::kHalf, .head_size = 8, .queries = 4, .keys = 4};
  EXPECT_EQ(choose_attention(c).form, Form::kLibTorch);
  c.documents = true;
  EXPECT_EQ(choose_attention(c).form, Form::kReference);
  c.dtype = at::kFloat;
  EXPECT_EQ(choose_attention(c).form, Form::kKernel);
}

TEST(AttentionChoice, ThereIsFlashAttentionOnGpusAlone) {
  EXPECT_FALSE(has_flash(at::kCPU));
  EXPECT_FALSE(has_efficient(at::kCPU));
  EXPECT_FALSE(has_flash(c10::Device(c10::kCUDA, 0)));  // this process has no CUDA half of LibTorch
}

// Diagonals and windows mean the mask, in rows whose backward measures windows from the first key.
TEST(AttentionChoice, EfficientMasksMeanTheMask) {
  int masks = 0;
  for (int64_t queries = 1; queries < 6; ++queries)
    for (int64_t keys = 1; keys < 6; ++keys)
      for (int64_t offset = -3; offset < 8; ++offset)
        for (int64_t window = 0; window < 8; ++window) {
          AttentionCase c{.queries = queries, .keys = keys, .query_offset = offset};
          if (window > 0) c.sliding_window = window;
          const auto mask = efficient_mask(c);
          masks += mask.has_value();
          if (!mask) continue;
          const bool to_last = mask->diagonal == Diagonal::kToLast;
          EXPECT_FALSE(to_last && mask->window > 0);
          for (int64_t t = 0; t < queries; ++t) {
            int64_t seen = 0;
            for (int64_t s = 0; s < keys; ++s) {
              const bool by_mask = s <= t + offset && (window == 0 || s > t + offset - window);
              seen += by_mask;
              const int64_t last = t + (to_last ? keys - queries : 0);
              const bool by_kernel = (mask->diagonal == Diagonal::kNone || s <= last) &&
                                     (mask->window == 0 || s > t - mask->window);
              EXPECT_EQ(by_mask, by_kernel)
                  << queries << " " << keys << " " << offset << " " << window;
            }
            EXPECT_GT(seen, 0);
          }
        }
  EXPECT_GT(masks, 100);
  const auto has = [](AttentionCase c) { return efficient_mask(c).has_value(); };
  EXPECT_TRUE(has({.queries = 8, .keys = 8, .sliding_window = 3}));
  EXPECT_TRUE(has({.queries = 3, .keys = 8, .query_offset = 5}));
  EXPECT_TRUE(has({.queries = 8, .keys = 8, .query_offset = 8}));
}

// The keys of a band are those of the mask, and every query has one; bands that would say more are
// none.
TEST(AttentionChoice, BandsMeanTheMask) {
  int bands = 0;
  for (int64_t queries = 1; queries < 6; ++queries)
    for (int64_t keys = 1; keys < 6; ++keys)
      for (int64_t offset = -3; offset < 8; ++offset)
        for (int64_t window = 0; window < 8; ++window) {
          AttentionCase c{.queries = queries, .keys = keys, .query_offset = offset};
          if (window > 0) c.sliding_window = window;
          const auto band = flash_band(c);
          bands += band.has_value();
          bool all_see = true;
          for (int64_t t = 0; t < queries; ++t) {
            int64_t seen = 0;
            for (int64_t s = 0; s < keys; ++s) {
              const bool by_mask = s <= t + offset && (window == 0 || s > t + offset - window);
              seen += by_mask;
              if (!band) continue;
              const int64_t ahead = s - (t + keys - queries);
              const bool by_band = ahead <= band->right && (band->left < 0 || ahead >= -band->left);
              EXPECT_EQ(by_mask, by_band)
                  << queries << " " << keys << " " << offset << " " << window;
            }
            all_see &= seen > 0;
          }
          const bool ends_last = offset >= keys - queries;
          EXPECT_EQ(band.has_value(), all_see && ends_last);
        }
  EXPECT_GT(bands, 100);
}

// A document that begins at a token of the row [0, 3 T), in parts of T queries and T keys: among
// its own queries and keys the band says what the mask says.
TEST(AttentionChoice, BandsOfDocumentsMeanTheMask) {
  constexpr int64_t kChunk = 4;
  int bands = 0;
  for (const int64_t ahead : {0, 1, 2})
    for (int64_t window = 0; window < 14; ++window) {
      AttentionCase c{.queries = kChunk, .keys = kChunk, .query_offset = ahead * kChunk};
      if (window > 0) c.sliding_window = window;
      const auto band = flash_document_band(c);
      bands += band.has_value();
      EXPECT_EQ(band.has_value(), ahead == 0 || window == 0 || window >= (ahead + 1) * kChunk);
      if (!band) continue;
      for (int64_t begin = 0; begin < 3 * kChunk; ++begin)
        for (int64_t end = begin + 1; end <= 3 * kChunk; ++end) {
          const auto clip = [&](int64_t place) { return std::clamp<int64_t>(place, 0, kChunk); };
          const int64_t k_begin = clip(begin), k_end = clip(end);
          const int64_t q_begin = clip(begin - c.query_offset), q_end = clip(end - c.query_offset);
          for (int64_t t = q_begin; t < q_end; ++t)
            for (int64_t s = k_begin; s < k_end; ++s) {
              const int64_t last = t + c.query_offset;
              const bool by_mask = s <= last && (window == 0 || s > last - window);
              const int64_t beside = (s - k_end) - (t - q_end);
              const bool by_band = (band->right < 0 || beside <= band->right) &&
                                   (band->left < 0 || beside >= -band->left);
              EXPECT_EQ(by_mask, by_band) << ahead << " " << window << " " << begin << " " << end;
            }
        }
    }
  EXPECT_GT(bands, 20);
}

}  // namespace
}  // namespace capstan::ops
