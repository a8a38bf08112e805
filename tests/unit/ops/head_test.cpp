// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/head.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "ops/logits_internal.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;
using testing::PlainStoreOptions;

// Large enough that plan::head_chunk_tokens cuts the tokens into several chunks.
struct Problem {
  int64_t samples, tokens, hidden, vocab;
};
constexpr Problem kSmall{2, 9, 6, 37}, kChunked{3, 700, 4, 1003};

std::vector<plan::ParamSpec> table(const Problem& p) {
  auto spec = param_spec("head", {p.vocab, p.hidden});
  spec.tensor.kind = plan::ShardRule::Kind::kVocab;
  return {spec};
}
Projection head_of(PlainStore& store) { return {{store.find("head")}, {}}; }

Tensor targets_of(const Problem& p) {
  Tensor t = (at::arange(p.samples * p.tokens, at::kLong) * 7919).remainder(p.vocab);
  t.slice(0, 3, std::nullopt, 5).fill_(kIgnoreTarget);
  return t.view({p.samples, p.tokens});
}
Tensor weights_of(const Problem& p) { return normal({p.samples, p.tokens}, 9).abs() + 0.1; }

// Plain autograd on ATen ops.
Tensor plain_logprob(const Tensor& x, const Tensor& w, const Tensor& targets) {
  const Tensor logp = at::log_softmax(at::matmul(x, w.t()), -1);
  const Tensor valid = targets.ne(kIgnoreTarget);
  const Tensor index = at::where(valid, targets, at::zeros_like(targets)).unsqueeze(-1);
  return logp.gather(-1, index).squeeze(-1) * valid.to(x.scalar_type());
}

// One label at a time: the first whose probabilities, added up, exceed u.
Tensor plain_labels(const Tensor& logits, const Tensor& targets, const Tensor& uniform) {
  const Tensor labels = targets.clone();
  const Tensor p = at::softmax(logits.to(at::kDouble), -1);
  for (int64_t b = 0; b < targets.size(0); ++b)
    for (int64_t t = 0; t < targets.size(1); ++t) {
      if (targets[b][t].item<int64_t>() == kIgnoreTarget) continue;
      const double u = uniform[b][t].item<double>();
      double sum = 0;
      int64_t v = 0;
      for (; v + 1 < p.size(2); ++v)
        if ((sum += p[b][t][v].item<double>()) > u) break;
      labels[b][t] = v;
    }
  return labels;
}

Tensor uniform_of(const Problem& p) {
  const Tensor u = (at::arange(p.samples * p.tokens, at::kDouble) + 0.5).mul_(0.618034);
  return (u - u.floor()).view({p.samples, p.tokens});
}

TEST(HeadWeightedLoss, DrawnLabels_TakeThePlaceOfTargets) {
  for (const auto type : {at::kDouble, at::kFloat}) {
    PlainStore store(table(kSmall), {.values = type, .gradients = type});
    const Tensor x = normal({kSmall.samples, kSmall.tokens, kSmall.hidden}, 1).to(type) * 3;
    const Tensor targets = targets_of(kSmall), weights = weights_of(kSmall).to(type);
    const Tensor uniform = uniform_of(kSmall);
    const Tensor labels = plain_labels(head_logits(x, head_of(store)), targets, uniform);
    EXPECT_GT(labels.ne(targets).sum().item<int64_t>(), 5);
    const auto drawn = head_weighted_loss(x, head_of(store), targets, weights, {}, uniform);
    const auto given = head_weighted_loss(x, head_of(store), labels, weights);
    EXPECT_TRUE(drawn.logprob_BT.equal(given.logprob_BT));
    EXPECT_TRUE(drawn.loss.equal(given.loss));
  }
}

// Rows that are drawn in parts are drawn as each of them alone.
TEST(DrawLabels, ManyRows_AreThoseOfEachRow) {
  const int64_t rows = 70, columns = 32768;
  ASSERT_LT(plan::label_tokens(columns, rows), rows / 2);
  const Tensor logits = normal({rows, columns}, 5).to(at::kFloat) * 3;
  const Tensor before = logits.clone();
  const Tensor uniform = (at::arange(rows, at::kDouble) + 0.5) / rows;
  const Tensor targets = at::arange(rows, at::kLong);
  const Tensor labels = draw_labels(logits, targets, uniform, 0, {});
  EXPECT_TRUE(logits.equal(before));
  for (int64_t row = 0; row < rows; ++row) {
    const auto one = [&](const Tensor& x) { return x.narrow(0, row, 1); };
    EXPECT_TRUE(one(labels).equal(draw_labels(one(logits), one(targets), one(uniform), 0, {})))
        << row;
  }
  EXPECT_GT(labels.ne(targets).sum().item<int64_t>(), rows - 3);
}

TEST(HeadWeightedLoss, DrawnLabels_FollowTheDistribution) {
  PlainStore store(table(kChunked), {.values = at::kFloat, .gradients = at::kFloat});
  // Every token sees the same logits, so the shares of labels are its probabilities.
  const Tensor x = normal({1, 1, kChunked.hidden}, 4)
                       .to(at::kFloat)
                       .expand({kChunked.samples, kChunked.tokens, kChunked.hidden})
                       .contiguous();
  const Tensor targets = at::zeros({kChunked.samples, kChunked.tokens}, at::kLong);
  const auto drawn = head_weighted_loss(x, head_of(store), targets, at::ones_like(targets), {},
                                        uniform_of(kChunked));
  const Tensor logp = at::log_softmax(head_logits(x, head_of(store))[0][0].to(at::kDouble), -1);
  const double entropy = -(logp.exp() * logp).sum().item<double>();
  EXPECT_NEAR(-drawn.logprob_BT.to(at::kDouble).mean().item<double>(), entropy, 0.02);
}

// A head that stays in fp32 beside bf16 activations: logits are fp32's.
TEST(HeadWeightedLoss, WideWeight_GivesWideLogits) {
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    auto wide = table(kChunked);
    wide.front().wide = true;
    PlainStore kept(wide, {.values = at::kBFloat16, .gradients = at::kFloat, .wide = at::kFloat});
    PlainStore whole(wide, {.values = at::kFloat, .gradients = at::kFloat});
    const auto sizes = {kChunked.samples, kChunked.tokens, kChunked.hidden};
    const Tensor x = leaf(normal(sizes, 1).to(at::kBFloat16)), x_wide = leaf(x.to(at::kFloat));
    const auto targets = targets_of(kChunked), weights = weights_of(kChunked);
    const auto out = head_weighted_loss(x, head_of(kept), targets, weights);
    const auto expected = head_weighted_loss(x_wide, head_of(whole), targets, weights);
    EXPECT_TRUE(testing::near(out.loss, expected.loss));
    EXPECT_TRUE(testing::near(out.logprob_BT, expected.logprob_BT));
    torch::autograd::backward({out.loss}, {});
    torch::autograd::backward({expected.loss}, {});
    EXPECT_TRUE(testing::near(x.grad(), x_wide.grad().to(at::kBFloat16)));
    EXPECT_TRUE(testing::near(kept.gradient_of("head"), whole.gradient_of("head")));
  }
}

TEST(HeadWeightedLoss, MatchesPlainAutograd) {
  for (const Path form : {Path::kFused, Path::kReference})
    for (const Problem& p : {kSmall, kChunked})
      for (const int64_t padding : {0, 5}) {
        const PathGuard guard(form);
        PlainStore store(table(p), {.vocab_padding = padding});
        const Tensor x = leaf(normal({p.samples, p.tokens, p.hidden}, 1)), x2 = leaf(x);
        const Tensor w2 = leaf(store.value_of("head").narrow(0, 0, p.vocab));
        const auto out = head_weighted_loss(x, head_of(store), targets_of(p), weights_of(p));
        const Tensor logprob = plain_logprob(x2, w2, targets_of(p));
        const Tensor want = -(weights_of(p) * logprob).sum();
        EXPECT_TRUE(testing::near(out.loss, want));
        EXPECT_TRUE(testing::near(out.logprob_BT, logprob));
        torch::autograd::backward({out.loss}, {});
        torch::autograd::backward({want}, {});
        EXPECT_TRUE(testing::near(x.grad(), x2.grad()));
        const Tensor grad = store.gradient_of("head");
        EXPECT_TRUE(testing::near(grad.narrow(0, 0, p.vocab), w2.grad()));
        EXPECT_TRUE(at::equal(grad.narrow(0, p.vocab, padding),
                              at::zeros({padding, p.hidden}, at::kDouble)));
      }
}

TEST(HeadWeightedLoss, NarrowDtypesStayClose) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf})
    for (const Path form : {Path::kFused, Path::kReference}) {
      const PathGuard guard(form);
      PlainStore store(table(kChunked), {.values = dtype, .gradients = at::kFloat});
      const Tensor x = leaf(normal({3, 700, 4}, 1, dtype)), x2 = leaf(x.to(at::kDouble));
      const Tensor w2 = leaf(store.value_of("head").to(at::kDouble));
      const auto out =
          head_weighted_loss(x, head_of(store), targets_of(kChunked), weights_of(kChunked));
      EXPECT_EQ(out.loss.scalar_type(), at::kFloat);
      torch::autograd::backward({out.loss}, {});
      const Tensor want =
          -(weights_of(kChunked) * plain_logprob(x2, w2, targets_of(kChunked))).sum();
      torch::autograd::backward({want}, {});
      const auto t = testing::tolerance_of(dtype);
      EXPECT_TRUE(testing::near(out.loss, want, {t.rtol / 4, 0}));
      EXPECT_TRUE(testing::near(x.grad(), x2.grad().to(dtype)));
      EXPECT_TRUE(testing::near(store.gradient_of("head").to(dtype), w2.grad().to(dtype)));
    }
}

TEST(HeadWeightedLoss, WithoutGradientNothingIsAccumulated) {
  PlainStore store(table(kSmall), {});
  const Tensor x = normal({2, 9, 6}, 1);
  Tensor loss;
  {
    at::NoGradGuard no_grad;
    loss = head_weighted_loss(x, head_of(store), targets_of(kSmall), weights_of(kSmall)).loss;
  }
  EXPECT_FALSE(store.has_gradient("head"));
  EXPECT_FALSE(loss.requires_grad());
  EXPECT_TRUE(testing::near(
      loss, head_weighted_loss(x, head_of(store), targets_of(kSmall), weights_of(kSmall)).loss));
  EXPECT_TRUE(store.has_gradient("head"));
}

TEST(HeadWeightedLoss, OtherSeedAndWrongTargetsAreRefused) {
  PlainStore store(table(kSmall), {});
  const Tensor x = leaf(normal({2, 9, 6}, 1));
  const auto out = head_weighted_loss(x, head_of(store), targets_of(kSmall), weights_of(kSmall));
  EXPECT_THROW(torch::autograd::backward({2 * out.loss}, {}), InternalError);
  for (const int64_t bad : {-1, 37, -99})
    EXPECT_THROW((void)head_weighted_loss(x, head_of(store), at::full({2, 9}, bad, at::kLong),
                                          weights_of(kSmall)),
                 DataError);
}

TEST(HeadWeightedLoss, NonFiniteLogitsShowInTheLoss) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    PlainStore store(table(kSmall), {.values = dtype, .gradients = dtype});
    Tensor x = normal({2, 9, 6}, 1, dtype);
    x[0][0][0] = std::numeric_limits<double>::quiet_NaN();
    EXPECT_TRUE(
        std::isnan(head_weighted_loss(x, head_of(store), targets_of(kSmall), weights_of(kSmall))
                       .loss.item<double>()));
    x[0][0][0] = std::numeric_limits<double>::infinity();
    EXPECT_FALSE(
        std::isfinite(head_weighted_loss(x, head_of(store), targets_of(kSmall), weights_of(kSmall))
                          .loss.item<double>()));
  }
}

TEST(HeadWeightedLoss, EveryTargetIgnoredGivesZero) {
  PlainStore store(table(kSmall), {});
  const Tensor x = leaf(normal({2, 9, 6}, 1));
  const auto out = head_weighted_loss(x, head_of(store), at::full({2, 9}, kIgnoreTarget, at::kLong),
                                      weights_of(kSmall));
  EXPECT_EQ(out.loss.item<double>(), 0);
  torch::autograd::backward({out.loss}, {});
  EXPECT_TRUE(at::equal(x.grad(), at::zeros_like(x)));
  EXPECT_TRUE(at::equal(store.gradient_of("head"), at::zeros({37, 6}, at::kDouble)));
}

TEST(HeadScores, LogprobAndEntropyMatchPlainAutograd) {
  for (const Path form : {Path::kFused, Path::kReference})
    for (const Problem& p : {kSmall, kChunked})
      for (const bool entropy : {false, true}) {
        const PathGuard guard(form);
        PlainStore store(table(p), {.vocab_padding = 3});
        const Tensor x = leaf(normal({p.samples, p.tokens, p.hidden}, 1)), x2 = leaf(x);
        const Tensor w2 = leaf(store.value_of("head").narrow(0, 0, p.vocab));
        const Tensor a = normal({p.samples, p.tokens}, 5), b = normal({p.samples, p.tokens}, 6);
        const auto out = head_scores(x, head_of(store), targets_of(p), entropy);
        Tensor total = (out.logprob_BT * a).sum();
        const Tensor logp = at::log_softmax(at::matmul(x2, w2.t()), -1);
        const Tensor plain_entropy =
            -(logp.exp() * logp).sum(-1) * targets_of(p).ne(kIgnoreTarget).to(at::kDouble);
        Tensor want = (plain_logprob(x2, w2, targets_of(p)) * a).sum();
        if (entropy) {
          EXPECT_TRUE(testing::near(out.entropy_BT, plain_entropy));
          total = total + (out.entropy_BT * b).sum();
          want = want + (plain_entropy * b).sum();
        }
        EXPECT_TRUE(testing::near(out.logprob_BT, plain_logprob(x2, w2, targets_of(p))));
        torch::autograd::backward({total}, {});
        torch::autograd::backward({want}, {});
        EXPECT_TRUE(testing::near(x.grad(), x2.grad()));
        EXPECT_TRUE(testing::near(store.gradient_of("head").narrow(0, 0, p.vocab), w2.grad()));
      }
}

TEST(HeadScores, FrozenHeadPassesTheGradientOn) {
  PlainStore store(table(kSmall), {.frozen = {"head"}}), live(table(kSmall), {});
  std::vector<Tensor> grads;
  for (PlainStore* s : {&store, &live}) {
    const Tensor x = leaf(normal({2, 9, 6}, 1));
    torch::autograd::backward(
        {head_weighted_loss(x, head_of(*s), targets_of(kSmall), weights_of(kSmall)).loss}, {});
    grads.push_back(x.grad());
  }
  EXPECT_TRUE(at::equal(grads[0], grads[1]));
  EXPECT_FALSE(store.has_gradient("head"));
}

TEST(HeadLogits, AreCutToTheRealVocabulary) {
  PlainStore store(table(kSmall), {.vocab_padding = 4});
  const Tensor x = normal({2, 1, 6}, 1);
  const Tensor want = at::matmul(x, store.value_of("head").narrow(0, 0, 37).t());
  EXPECT_TRUE(testing::near(head_logits(x, head_of(store)), want));
}

// Columns [first, first + count) of whole logits, combined over parts as ranks would.
TEST(LogitPieces, PartsOfTheVocabularyGiveTheWhole) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const Path form : {Path::kFused, Path::kReference}) {
      const PathGuard guard(form);
      const Tensor logits = 5 * normal({6, 50}, 1, dtype);
      const Tensor targets = at::tensor(std::vector<int64_t>{0, 49, 17, 30, kIgnoreTarget, 31});
      const Tensor weights = normal({6}, 2, dtype == at::kDouble ? at::kDouble : at::kFloat);
      const LogitStats whole = logit_stats(logits, targets, 0);
      const Tensor lse = whole.top_N + whole.sum_N.log();
      Tensor sum = at::zeros_like(lse), picked = at::zeros_like(lse);
      std::vector<Tensor> grads;
      for (const auto& [first, count] :
           {std::pair<int64_t, int64_t>{0, 17}, {17, 14}, {31, 19}, {50, 0}}) {
        const Tensor part = logits.narrow(1, first, count);
        const LogitStats s = logit_stats(part, targets, first);
        sum = sum + (count ? (s.top_N - whole.top_N).exp() * s.sum_N : at::zeros_like(lse));
        picked = picked + s.picked_N;
        grads.push_back(part.clone());
        logits_to_gradient_(grads.back(), lse, targets, weights, first);
      }
      EXPECT_TRUE(testing::near(sum, whole.sum_N, testing::tolerance_of(at::kFloat)));
      EXPECT_TRUE(at::equal(picked, whole.picked_N));
      const Tensor p = at::softmax(logits.to(at::kDouble), -1);
      Tensor want = p.clone();
      for (int64_t r = 0; r < 6; ++r)
        if (r != 4) want[r][targets[r].item<int64_t>()] -= 1;
      want = want * weights.unsqueeze(1);
      want[4].zero_();
      EXPECT_TRUE(testing::near(at::cat(grads, 1), want.to(dtype)));
    }
}

}  // namespace
}  // namespace capstan::ops
