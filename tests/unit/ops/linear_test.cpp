// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/linear.h"

#include <gtest/gtest.h>

#include <cmath>

#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;
using testing::PlainStoreOptions;

std::vector<plan::ParamSpec> joined_table() {
  return {param_spec("q", {6, 5}, 0), param_spec("k", {3, 5}, 0), param_spec("bq", {6}, 1),
          param_spec("bk", {3}, 1)};
}
Projection joined(PlainStore& store) {
  return {{store.find("q"), store.find("k")}, {store.find("bq"), store.find("bk")}};
}

TEST(Linear, GradientsMatchDifferences) {
  for (const bool one_tensor : {true, false}) {
    PlainStore store(joined_table(), {.joined = one_tensor});
    const Projection p = joined(store);
    const Tensor x = leaf(normal({2, 4, 5}, 1)), w = normal({2, 4, 9}, 2);
    run_backward(linear(x, p), w);
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      return weighted_sum(linear(x, p), w);
    };
    EXPECT_TRUE(testing::is_gradient(loss, x.detach(), x.grad()));
    for (const char* name : {"q", "k", "bq", "bk"})
      EXPECT_TRUE(testing::is_gradient(loss, store.value_of(name), store.gradient_of(name)))
          << name;
  }
}

TEST(Linear, JoinedEqualsSeparateProjections) {
  PlainStore store(joined_table(), {});
  const Tensor x = normal({3, 5}, 1);
  const Tensor y = linear(x, joined(store));
  const Projection q{{store.find("q")}, {store.find("bq")}},
      k{{store.find("k")}, {store.find("bk")}};
  EXPECT_TRUE(testing::near(y, at::cat({linear(x, q), linear(x, k)}, -1)));
}

// A weight that stays in fp32 beside bf16 activations: the product is fp32's, rounded once.
TEST(Linear, WideWeight_MultipliesInItsOwnType) {
  auto table = joined_table();
  for (auto& spec : table) spec.wide = true;
  const PlainStoreOptions narrow{
      .values = at::kBFloat16, .gradients = at::kFloat, .wide = at::kFloat};
  PlainStore kept(table, narrow), whole(table, {.values = at::kFloat, .gradients = at::kFloat});
  const Tensor x = leaf(normal({3, 5}, 1).to(at::kBFloat16)), w = normal({3, 9}, 2);
  const Tensor x_wide = leaf(x.detach().to(at::kFloat));
  const Tensor y = linear(x, joined(kept)), expected = linear(x_wide, joined(whole));
  ASSERT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(testing::near(y, expected.to(at::kBFloat16)));
  const Tensor grad = w.to(at::kBFloat16);
  run_backward(y, grad);
  run_backward(expected, grad);
  ASSERT_EQ(x.grad().scalar_type(), at::kBFloat16);
  EXPECT_TRUE(testing::near(x.grad(), x_wide.grad().to(at::kBFloat16)));
}

// The sums that a weight gradient brings are the bias's gradient, unless it comes too late.
TEST(Linear, SumsOfTheGradientComeWithTheWeights) {
  struct Case {
    bool deferred, with_bias, brings;
    std::vector<std::string> frozen;
    bool is_asked;
    double bias;  // its gradient; NaN: none
  };
  for (const Case& c : {Case{false, true, true, {}, true, 100},
                        {false, true, false, {}, true, 3},
                        {true, true, true, {}, false, 3},
                        {false, false, true, {}, false, NAN},
                        {false, true, true, {"w"}, false, 3},
                        {false, true, true, {"b"}, false, NAN}}) {
    PlainStore store({param_spec("w", {2, 5}), param_spec("b", {2})},
                     {.deferred = c.deferred, .frozen = c.frozen});
    const Projection p{{store.find("w")}, {store.find("b")}};
    linear_gradients(p, at::ones({3, 2}, at::kDouble), c.with_bias,
                     [&c](param::GradSlot& slot, Tensor* sums_O) {
                       EXPECT_EQ(sums_O != nullptr, c.is_asked);
                       param::add_to_slot(slot, at::ones({2, 5}));
                       if (c.brings && sums_O) *sums_O = at::full({2}, 100.0);
                     });
    store.run_deferred();
    EXPECT_EQ(store.has_gradient("w"), c.frozen != std::vector<std::string>{"w"});
    ASSERT_EQ(store.has_gradient("b"), !std::isnan(c.bias));
    if (std::isnan(c.bias)) continue;
    EXPECT_TRUE(store.gradient_of("b").eq(c.bias).all().item<bool>());
  }
}

TEST(Linear, SecondBackwardAdds_FirstOverwrites) {
  PlainStore store(joined_table(), {});
  const Tensor x = normal({3, 5}, 1), w = normal({3, 9}, 2);
  run_backward(linear(x, joined(store)), w);
  const Tensor once = store.gradient_of("k").clone(), bias_once = store.gradient_of("bq").clone();
  run_backward(linear(x, joined(store)), w);
  EXPECT_TRUE(testing::near(store.gradient_of("k"), 2 * once));
  EXPECT_TRUE(testing::near(store.gradient_of("bq"), 2 * bias_once));
  store.clear_gradients();
  run_backward(linear(x, joined(store)), w);
  EXPECT_TRUE(testing::near(store.gradient_of("k"), once));
}

TEST(Linear, DeferredWeightGradientIsTheSame) {
  PlainStore now(joined_table(), {}), later(joined_table(), {.deferred = true});
  const Tensor w = normal({3, 9}, 2);
  for (PlainStore* store : {&now, &later}) {
    Tensor x = leaf(normal({3, 5}, 1));
    Tensor y = linear(x, joined(*store));
    run_backward(y, w);
  }
  EXPECT_FALSE(later.has_gradient("q"));
  later.run_deferred();
  EXPECT_TRUE(testing::near(later.gradient_of("q"), now.gradient_of("q")));
}

TEST(Linear, FrozenWeightPassesTheGradientOn) {
  PlainStore store(joined_table(), {.frozen = {"q", "k", "bq", "bk"}});
  const Tensor x = leaf(normal({3, 5}, 1)), w = normal({3, 9}, 2);
  run_backward(linear(x, joined(store)), w);
  EXPECT_TRUE(testing::near(x.grad(), at::mm(w, joined(store).weight())));
  EXPECT_FALSE(store.has_gradient("q"));
  EXPECT_FALSE(linear(normal({3, 5}, 1), joined(store)).requires_grad());
}

TEST(Linear, NarrowComputeAddsIntoFp32) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    PlainStore store(joined_table(), {.values = dtype, .gradients = at::kFloat});
    const Tensor x = leaf(normal({7, 5}, 1, dtype)), w = normal({7, 9}, 2, dtype);
    run_backward(linear(x, joined(store)), w);
    run_backward(linear(x, joined(store)), w);
    const Tensor want = 2 * at::mm(w.to(at::kFloat).t(), x.detach().to(at::kFloat));
    EXPECT_EQ(store.gradient_of("q").scalar_type(), at::kFloat);
    EXPECT_TRUE(testing::near(store.gradient_of("q"), want.narrow(0, 0, 6).to(dtype)));
    EXPECT_TRUE(testing::near(
        x.grad(), 2 * at::mm(w.to(at::kFloat), joined(store).weight().to(at::kFloat)).to(dtype)));
  }
}

TEST(Linear, StridedInputAndExpandedGradient) {
  PlainStore store({param_spec("w", {4, 5})}, {});
  const Projection p{{store.find("w")}, {}};
  const Tensor x = leaf(normal({5, 3, 2}, 1));
  const Tensor y = linear(x.permute({2, 1, 0}), p);
  EXPECT_TRUE(testing::near(y, at::matmul(x.detach().permute({2, 1, 0}), store.value_of("w").t())));
  torch::autograd::backward({y.sum()}, {});
  const Tensor want = x.detach().sum(at::IntArrayRef{1, 2}).unsqueeze(0).expand({4, 5});
  EXPECT_TRUE(testing::near(store.gradient_of("w"), want));
}

TEST(AddBias, EqualsBiasInTheProduct) {
  PlainStore a(joined_table(), {}), b(joined_table(), {});
  const Tensor xa = leaf(normal({3, 5}, 1)), xb = leaf(normal({3, 5}, 1)), w = normal({3, 9}, 2);
  const Tensor fused = linear(xa, joined(a));
  const Tensor split = add_bias(linear(xb, joined(b), false), joined(b));
  EXPECT_TRUE(testing::near(split, fused));
  run_backward(fused, w);
  run_backward(split, w);
  EXPECT_TRUE(testing::near(xb.grad(), xa.grad()));
  EXPECT_TRUE(testing::near(b.gradient_of("bk"), a.gradient_of("bk")));
  EXPECT_TRUE(testing::near(b.gradient_of("q"), a.gradient_of("q")));
}

}  // namespace
}  // namespace capstan::ops
