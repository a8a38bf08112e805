// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/embedding.h"

#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;

std::vector<plan::ParamSpec> table(int64_t vocab, int64_t width) {
  auto spec = param_spec("table", {vocab, width});
  spec.tensor.kind = plan::ShardRule::Kind::kVocab;
  return {spec};
}

Tensor some_ids() { return at::tensor({3, 0, 3, 6, 1, 3, 0, 6}, at::kLong).view({2, 4}); }

TEST(Embedding, LooksUpAndScattersInEveryDtype) {
  for (const auto value : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (const auto residual : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const auto grads = residual == at::kDouble ? at::kDouble : at::kFloat;
      PlainStore store(table(7, 70), {.values = value, .gradients = grads});
      const Tensor x = embedding(some_ids(), store.find("table"), residual);
      EXPECT_EQ(x.scalar_type(), residual);
      EXPECT_TRUE(at::equal(x, at::embedding(store.value_of("table"), some_ids()).to(residual)));
      const Tensor w = normal({2, 4, 70}, 1, residual);
      for (int pass = 1; pass <= 2; ++pass) {
        run_backward(embedding(some_ids(), store.find("table"), residual), w);
        Tensor want = at::zeros({7, 70}, grads);
        want.index_add_(0, some_ids().view({-1}), pass * w.view({8, 70}).to(grads));
        EXPECT_TRUE(testing::near(store.gradient_of("table"), want));
      }
    }
}

TEST(Embedding, PartsOfTheVocabularySumToTheWhole) {
  PlainStore whole(table(7, 5), {});
  const Tensor w = normal({2, 4, 5}, 1),
               want = embedding(some_ids(), whole.find("table"), at::kDouble);
  run_backward(want, w);
  Tensor sum = at::zeros_like(want);
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{0, 4}, {4, 3}, {7, 0}}) {
    PlainStore part(table(7, 5), {.vocab_padding = 2, .vocab_box = {{begin, 0}, {count, 5}}});
    const Tensor x = embedding(some_ids(), part.find("table"), at::kDouble);
    sum = sum + x.detach();
    run_backward(x, w);
    const Tensor grad = part.gradient_of("table");
    EXPECT_TRUE(
        testing::near(grad.narrow(0, 0, count),
                      whole.gradient_of("table").narrow(0, std::min<int64_t>(begin, 6), count)));
    EXPECT_TRUE(at::equal(grad.narrow(0, count, 2), at::zeros({2, 5}, at::kDouble)));
  }
  EXPECT_TRUE(at::equal(sum, want));
}

TEST(Embedding, ThreadsDoNotChangeTheSum) {
  std::vector<Tensor> grads;
  const int before = at::get_num_threads();
  for (const int threads : {1, 4}) {
    at::set_num_threads(threads);
    PlainStore store(table(5, 300), {.values = at::kFloat, .gradients = at::kFloat});
    const Tensor ids = at::arange(2000, at::kLong).remainder(5).view({2, 1000});
    run_backward(embedding(ids, store.find("table"), at::kFloat), normal({2, 1000, 300}, 1));
    grads.push_back(store.gradient_of("table"));
  }
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(grads[0], grads[1]));
}

TEST(Embedding, IdsOutsideTheVocabularyAreADataError) {
  PlainStore store(table(7, 5), {});
  for (const int64_t id : {-1, 7, 1 << 30})
    EXPECT_THROW((void)embedding(at::full({1, 2}, id, at::kLong), store.find("table"), at::kDouble),
                 DataError);
  EXPECT_THROW((void)embedding(at::zeros({1, 2}, at::kInt), store.find("table"), at::kDouble),
               InternalError);
}

}  // namespace
}  // namespace capstan::ops
