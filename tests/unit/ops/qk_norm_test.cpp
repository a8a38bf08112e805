// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Norms of query and key heads before RoPE. Legend: B samples, T tokens, X features of all heads, H
// head size.
#include "capstan/ops/qk_norm.h"

#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;

constexpr int64_t kQueries = 3, kKeys = 2;

PlainStore make_store(int64_t head_size, testing::PlainStoreOptions options) {
  plan::ParamSpec q = param_spec("q", {head_size}), k = param_spec("k", {head_size});
  q.wide = k.wide = options.wide.has_value();
  return PlainStore({q, k}, std::move(options));
}
QkNorm norm_of(PlainStore& store) {
  return {.q_weight_H = store.find("q"), .k_weight_H = store.find("k"), .eps = 0.01};
}
RopeSpec rope_of(int64_t head_size) {
  return {.theta = 500.0, .head_size = head_size, .heads = kQueries + kKeys};
}
Tensor input(int64_t head_size, at::ScalarType dtype, int64_t tokens = 5) {
  return normal({2, tokens, (kQueries + kKeys + 2) * head_size}, 1, dtype);
}

// By autograd, in fp64, from what rope() turns.
Tensor by_hand(const Tensor& x, const Tensor& positions, const Tensor& q_weight,
               const Tensor& k_weight, int64_t head_size) {
  const PathGuard guard(Path::kReference);
  const auto normed = [&](int64_t first, int64_t count, const Tensor& weight) {
    const Tensor h = x.narrow(2, first * head_size, count * head_size)
                         .reshape({x.size(0), x.size(1), count, head_size});
    return (h / (h.square().mean(-1, true) + 0.01).sqrt() * weight).flatten(2);
  };
  const int64_t turned = kQueries + kKeys;
  const Tensor all = at::cat({normed(0, kQueries, q_weight), normed(kQueries, kKeys, k_weight),
                              x.narrow(2, turned * head_size, 2 * head_size)},
                             2);
  return rope(all, positions, rope_of(head_size));
}

struct Case {
  at::ScalarType dtype;
  bool wide;  // weights in fp32 beside bf16
};

TEST(QkNorm, BothFormsAndTheirGradientsMatchAutograd) {
  const Tensor restart = at::tensor({0, 1, 2, 0, 1, 5, 6, 7, 0, 900}, at::kLong).view({2, 5});
  for (const Case& c : {Case{at::kDouble, false},
                        {at::kFloat, false},
                        {at::kBFloat16, false},
                        {at::kBFloat16, true},
                        {at::kHalf, false}})
    for (const int64_t size : {2, 6, 16, 64, 80})
      for (const Tensor& positions : {Tensor(), restart})
        for (const Path form : {Path::kFused, Path::kReference}) {
          SCOPED_TRACE(fmt::format("{} wide {} head {} fused {}", at::toString(c.dtype), c.wide,
                                   size, form == Path::kFused));
          const PathGuard guard(form);
          testing::PlainStoreOptions options{.values = c.dtype};
          if (c.wide) options.wide = at::kFloat;
          PlainStore store = make_store(size, options);
          const Tensor x = leaf(input(size, c.dtype)), kept = x.detach().clone();
          const Tensor w = normal(x.sizes(), 2);
          const Tensor y = qk_norm_rope(x, positions, norm_of(store), kQueries, rope_of(size));
          run_backward(y, w);
          EXPECT_TRUE(at::equal(x.detach(), kept));
          const Tensor wide_x = leaf(x.detach().to(at::kDouble)),
                       q = leaf(store.value_of("q").to(at::kDouble)),
                       k = leaf(store.value_of("k").to(at::kDouble));
          const Tensor want = by_hand(wide_x, positions, q, k, size);
          torch::autograd::backward({want}, {w.to(c.dtype).to(at::kDouble)});
          ASSERT_TRUE(testing::near(y.detach(), want.detach()));
          ASSERT_TRUE(testing::near(x.grad(), wide_x.grad()));
          // In the gradients' type, whatever x has.
          const auto narrow = testing::tolerance_of(c.dtype);
          ASSERT_TRUE(testing::near(store.gradient_of("q"), q.grad(), narrow));
          ASSERT_TRUE(testing::near(store.gradient_of("k"), k.grad(), narrow));
        }
}

TEST(QkNorm, GradientsAreDerivatives) {
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    PlainStore store = make_store(6, {});
    const Tensor x = leaf(input(6, at::kDouble, 70)), w = normal(x.sizes(), 2), kept = w.clone();
    run_backward(qk_norm_rope(x, {}, norm_of(store), kQueries, rope_of(6)), w);
    EXPECT_TRUE(at::equal(w, kept));
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      return weighted_sum(
          qk_norm_rope(x.detach().clone(), {}, norm_of(store), kQueries, rope_of(6)), w);
    };
    EXPECT_TRUE(testing::is_gradient(loss, x.detach(), x.grad()));
    for (const char* name : {"q", "k"})
      EXPECT_TRUE(testing::is_gradient(loss, store.value_of(name), store.gradient_of(name)));
  }
}

TEST(QkNorm, WithoutABackwardItWorksInPlace) {
  PlainStore store = make_store(8, {});
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    const Tensor x = input(8, at::kDouble), graph = leaf(x);
    const Tensor want = qk_norm_rope(graph, {}, norm_of(store), kQueries, rope_of(8));
    const at::NoGradGuard no_grad;
    const Tensor got = qk_norm_rope(x, {}, norm_of(store), kQueries, rope_of(8));
    EXPECT_EQ(got.data_ptr(), x.data_ptr());
    EXPECT_TRUE(at::equal(got, want));
  }
}

// A frozen weight has no gradient, the other one keeps its own.
TEST(QkNorm, FrozenWeights) {
  for (const Path form : {Path::kFused, Path::kReference})
    for (const auto& frozen : {std::vector<std::string>{"q"}, {"q", "k"}}) {
      const PathGuard guard(form);
      PlainStore free = make_store(8, {}), store = make_store(8, {.frozen = frozen});
      const Tensor x = leaf(input(8, at::kDouble)), same = leaf(x), w = normal(x.sizes(), 2);
      run_backward(qk_norm_rope(x, {}, norm_of(store), kQueries, rope_of(8)), w);
      run_backward(qk_norm_rope(same, {}, norm_of(free), kQueries, rope_of(8)), w);
      EXPECT_TRUE(at::equal(x.grad(), same.grad()));
      EXPECT_FALSE(store.has_gradient("q"));
      EXPECT_EQ(store.has_gradient("k"), frozen.size() == 1);
    }
}

TEST(QkNorm, WrongInputIsRefused) {
  PlainStore store = make_store(8, {});
  const QkNorm norm = norm_of(store);
  EXPECT_THROW((void)qk_norm_rope(input(4, at::kDouble), {}, norm, kQueries, rope_of(4)),
               InternalError);
  EXPECT_THROW((void)qk_norm_rope(input(8, at::kDouble), {}, norm, 6, rope_of(8)), InternalError);
  EXPECT_THROW((void)qk_norm_rope(input(8, at::kFloat), {}, norm, kQueries, rope_of(8)),
               InternalError);
}

}  // namespace
}  // namespace capstan::ops
