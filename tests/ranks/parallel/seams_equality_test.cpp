// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Every cut over the tensor and context axes gives the numbers of one rank: outputs, input
// gradients and weight gradients, in fp64.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "ranks/parallel/seams_case.h"
#include "support/growing_cache.h"

namespace capstan::test {
namespace {

using at::Tensor;

struct Cut {
  int tp, cp;
  bool sequence, all_to_all;
};
std::vector<Cut> cuts() {
  std::vector<Cut> all;
  for (const int tp : {1, 2, 4})
    for (const int cp : {1, 2, 4})
      for (const bool sequence : {false, true})
        for (const bool all_to_all : {false, true}) {
          const bool skipped = (sequence && tp == 1) || (all_to_all && cp == 1);
          if (!skipped && tp * cp > 1 && tp * cp <= 8)
            all.push_back({tp, cp, sequence, all_to_all});
        }
  return all;
}

class EveryCut : public ::testing::TestWithParam<Cut> {
 protected:
  [[nodiscard]] static SeamsCase base() {
    const Cut cut = GetParam();
    SeamsCase c;
    c.tp = cut.tp;
    c.cp = cut.cp;
    c.sequence = cut.sequence;
    c.all_to_all = cut.all_to_all;
    return c;
  }
};

TEST_P(EveryCut, JoinedRows) { expect_equal_to_one_rank(base()); }

TEST_P(EveryCut, DocumentsAndWindows) {
  for (const auto window : {std::optional<int64_t>{}, std::optional<int64_t>{1},
                            std::optional<int64_t>{6}, std::optional<int64_t>{15}})
    for (const bool documents : {false, true}) {
      if (!window && !documents) continue;
      SeamsCase c = base();
      c.window = window;
      c.documents = documents;
      expect_equal_to_one_rank(c);
    }
}

TEST_P(EveryCut, BiasesAndDeferredWeightGradients) {
  SeamsCase c = base();
  c.bias = true;
  c.deferred = true;
  c.documents = true;
  expect_equal_to_one_rank(c);
}

TEST_P(EveryCut, KeyValueHeads) {
  for (const int64_t heads : {1, 4, 8}) {
    SeamsCase c = base();
    c.key_value_heads = heads;
    c.samples = 1;
    expect_equal_to_one_rank(c);
  }
}

TEST_P(EveryCut, ScoresAndEntropyWithOrdinaryBackward) {
  SeamsCase c = base();
  c.entropy = true;
  expect_equal_to_one_rank(c);
}

// 20 rows of vocabulary in parts of 16: the last ranks hold nothing but padding.
TEST_P(EveryCut, RanksWithoutVocabulary) {
  for (const bool tied : {false, true})
    for (const bool entropy : {false, true}) {
      SeamsCase c = base();
      c.vocab = 20;
      c.vocab_multiple = 16;
      c.tied = tied;
      c.entropy = entropy;
      c.deferred = tied;
      expect_equal_to_one_rank(c);
    }
}

TEST_P(EveryCut, FrozenBlocks) {
  for (const std::vector<int>& frozen : {std::vector<int>{0}, {0, 1}, {2}, {3}}) {
    SeamsCase c = base();
    c.frozen_blocks = frozen;
    expect_equal_to_one_rank(c);
  }
}

TEST_P(EveryCut, LogitsOfTheLastPositions) {
  SeamsCase c = base();
  c.documents = true;
  SeamsRank reference(c, {});
  for (const int64_t count : {int64_t{1}, int64_t{5}, c.tokens}) {
    const Tensor want = reference.logits(count);
    ASSERT_EQ(want.sizes(), (std::vector<int64_t>{c.samples, count, c.vocab}));
    std::vector<double> errors(static_cast<size_t>(c.ranks()));
    run_ranks_of(c, [&](SeamsRank& rank, int index) {
      errors[static_cast<size_t>(index)] = error_of(rank.logits(count), want);
    });
    for (const double error : errors) EXPECT_LE(error, 1e-11) << c.text();
  }
}

TEST_P(EveryCut, GathersAndReductionsInChunks) {
  if (!GetParam().sequence) return;  // nothing is gathered
  for (const bool deferred : {false, true}) {
    SeamsCase c = base();
    c.overlap = true;
    c.bias = true;
    c.deferred = deferred;
    expect_equal_to_one_rank(c);
    c.samples = 1;
    c.frozen_blocks = {0, 2};
    expect_equal_to_one_rank(c);
  }
}

// Decoding cuts neither tokens nor rows, whatever the layout of training.
Tensor decode(SeamsRank& rank, const SeamsCase& c) {
  const at::NoGradGuard no_grad;
  const Tensor ids = batch_of(c).ids_BT;
  GrowingCache cache;
  std::vector<Tensor> steps;
  for (const int64_t count : {7, 1, 1, 4, 1, 3}) {
    const int64_t done = cache.length();
    param::RowMap rows;
    rows.positions_BT = at::arange(done, done + count, at::kLong).expand({c.samples, count});
    rows.positions_are_rows = false;
    const param::Context context{.mode = param::Mode::kDecode, .rows = &rows, .cache = &cache};
    nn::BlockIO io =
        rank.model().embedding->forward(context, rank.seams(), ids.narrow(1, done, count));
    for (const auto& layer : rank.model().layers) io = layer->forward(context, rank.seams(), io);
    steps.push_back(rank.model().head->logits(context, rank.seams(), io, count));
  }
  return at::cat(steps, 1);
}

TEST_P(EveryCut, CachedDecodingEqualsTheFullForward) {
  for (const auto window : {std::optional<int64_t>{}, std::optional<int64_t>{5}}) {
    SeamsCase c = base();
    c.window = window;
    const Tensor want = SeamsRank(c, {}).logits(c.tokens).narrow(1, 0, 17);
    std::vector<double> errors(static_cast<size_t>(c.ranks()));
    run_ranks_of(c, [&](SeamsRank& rank, int index) {
      errors[static_cast<size_t>(index)] = error_of(decode(rank, c), want);
    });
    for (const double error : errors) EXPECT_LE(error, 1e-11) << c.text();
  }
}

INSTANTIATE_TEST_SUITE_P(Seams, EveryCut, ::testing::ValuesIn(cuts()), [](const auto& instance) {
  const Cut& c = instance.param;
  return "Tp" + std::to_string(c.tp) + (c.sequence ? "Sp" : "") + "Cp" + std::to_string(c.cp) +
         (c.cp == 1      ? ""
          : c.all_to_all ? "AllToAll"
                         : "Ring");
});

}  // namespace
}  // namespace capstan::test
