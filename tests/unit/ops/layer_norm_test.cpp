// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/layer_norm.h"

#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;

constexpr double kEps = 1e-5;

struct Case {
  at::ScalarType residual, compute;
  bool keeps_weight = false, keeps_bias = false;  // in fp32
};
struct Result {
  Tensor residual, normed, d_residual, d_hidden, d_weight, d_bias;
};

std::vector<plan::ParamSpec> specs_of(int64_t width, Case c = {at::kDouble, at::kDouble}) {
  std::vector<plan::ParamSpec> specs{param_spec("w", {width}), param_spec("b", {width})};
  specs[0].wide = c.keeps_weight;
  specs[1].wide = c.keeps_bias;
  return specs;
}

Result run(Path form, Case c, at::IntArrayRef sizes, bool with_hidden, bool use_residual) {
  const PathGuard guard(form);
  PlainStore store(specs_of(sizes.back(), c),
                   {.values = c.compute,
                    .gradients = c.compute == at::kDouble ? at::kDouble : at::kFloat,
                    .wide = at::kFloat});
  // A mean beside the spread, as residual streams have it.
  const Tensor residual = leaf(normal(sizes, 1, c.residual) + 1.5);
  const Tensor hidden = with_hidden ? leaf(normal(sizes, 2, c.compute)) : Tensor();
  const auto out = add_layer_norm(residual, hidden, store.find("w"), store.find("b"), kEps);
  Tensor total = (out.normed.to(at::kDouble) * normal(sizes, 3)).sum();
  if (use_residual) total = total + (out.residual.to(at::kDouble) * normal(sizes, 4)).sum();
  torch::autograd::backward({total}, {});
  return {out.residual,           out.normed,
          residual.grad(),        with_hidden ? hidden.grad() : Tensor(),
          store.gradient_of("w"), store.gradient_of("b")};
}

TEST(AddLayerNorm, KernelMatchesReference_EveryDtypeAndOddSizes) {
  for (const Case c : {Case{at::kDouble, at::kDouble}, Case{at::kFloat, at::kFloat},
                       Case{at::kFloat, at::kBFloat16}, Case{at::kBFloat16, at::kBFloat16},
                       Case{at::kFloat, at::kHalf}, Case{at::kFloat, at::kBFloat16, true, true},
                       Case{at::kFloat, at::kBFloat16, true, false}})
    for (const int64_t width : {2, 3, 8, 17, 64, 130})
      for (const int64_t rows : {1, 5, 150})
        for (const bool with_hidden : {true, false})
          for (const bool use_residual : {true, false}) {
            const std::vector<int64_t> sizes{rows, width};
            const Result a = run(Path::kFused, c, sizes, with_hidden, use_residual);
            const Result b = run(Path::kReference, c, sizes, with_hidden, use_residual);
            SCOPED_TRACE(fmt::format("{} {} rows {} width {} hidden {} residual {}",
                                     at::toString(c.residual), at::toString(c.compute), rows, width,
                                     with_hidden, use_residual));
            // Of few numbers next to nothing is left when mean and spread are taken out.
            testing::Tolerance gradient = testing::tolerance_of(c.compute);
            if (c.compute == at::kFloat) gradient.atol = 2e-6;
            ASSERT_TRUE(testing::near(a.residual, b.residual));
            ASSERT_TRUE(testing::near(a.normed, b.normed));
            ASSERT_TRUE(testing::near(a.d_residual, b.d_residual, gradient));
            if (with_hidden) {
              ASSERT_TRUE(testing::near(a.d_hidden, b.d_hidden, gradient));
            }
            ASSERT_TRUE(testing::near(a.d_weight, b.d_weight));
            ASSERT_TRUE(testing::near(a.d_bias, b.d_bias));
            ASSERT_EQ(a.normed.scalar_type(), c.compute);
            ASSERT_EQ(a.residual.scalar_type(), c.residual);
          }
}

TEST(AddLayerNorm, EqualsTorchLayerNormWithAutograd) {
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    PlainStore store(specs_of(13), {});
    const Tensor residual = leaf(normal({3, 13}, 1)), hidden = leaf(normal({3, 13}, 2));
    const Tensor x = leaf(residual + hidden), w = leaf(store.value_of("w")),
                 b = leaf(store.value_of("b")), weights = normal({3, 13}, 3);
    const auto out = add_layer_norm(residual, hidden, store.find("w"), store.find("b"), kEps);
    const Tensor want = at::layer_norm(x, {13}, w, b, kEps);
    EXPECT_TRUE(testing::near(out.normed, want));
    run_backward(out.normed, weights);
    run_backward(want, weights);
    EXPECT_TRUE(testing::near(residual.grad(), x.grad()));
    EXPECT_TRUE(testing::near(hidden.grad(), x.grad()));
    EXPECT_TRUE(testing::near(store.gradient_of("w"), w.grad()));
    EXPECT_TRUE(testing::near(store.gradient_of("b"), b.grad()));
  }
}

TEST(AddLayerNorm, GradientsMatchDifferences) {
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    PlainStore store(specs_of(11), {});
    const Tensor residual = leaf(normal({2, 3, 11}, 1)), hidden = leaf(normal({2, 3, 11}, 2));
    const Tensor wr = normal({2, 3, 11}, 3), wn = normal({2, 3, 11}, 4);
    const auto normed = [&] {
      return add_layer_norm(residual, hidden, store.find("w"), store.find("b"), kEps);
    };
    const auto out = normed();
    torch::autograd::backward({(out.residual * wr).sum() + (out.normed * wn).sum()}, {});
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      const auto o = normed();
      return weighted_sum(o.residual, wr) + weighted_sum(o.normed, wn);
    };
    EXPECT_TRUE(testing::is_gradient(loss, residual.detach(), residual.grad()));
    EXPECT_TRUE(testing::is_gradient(loss, hidden.detach(), hidden.grad()));
    EXPECT_TRUE(testing::is_gradient(loss, store.value_of("w"), store.gradient_of("w")));
    EXPECT_TRUE(testing::is_gradient(loss, store.value_of("b"), store.gradient_of("b")));
  }
}

// fp32 numbers of size 1000 that differ by about 1: a variance from mean squares would be noise.
TEST(AddLayerNorm, LargeMeansKeepTheirVariance) {
  const Tensor noise = normal({4, 96}, 5), large = (noise + 1000).to(at::kFloat);
  PlainStore store(specs_of(96), {.values = at::kFloat, .gradients = at::kFloat});
  const auto out = add_layer_norm(large, {}, store.find("w"), store.find("b"), kEps);
  const Tensor exact =
      at::layer_norm(large.to(at::kDouble), {96}, store.value_of("w").to(at::kDouble),
                     store.value_of("b").to(at::kDouble), kEps);
  EXPECT_LT((out.normed.to(at::kDouble) - exact).abs().max().item<double>(), 1e-3);
}

TEST(AddLayerNorm, InputsStayAndResidualAloneIsShared) {
  PlainStore store(specs_of(8), {.values = at::kFloat, .gradients = at::kFloat});
  const Tensor residual = normal({4, 8}, 1, at::kFloat), kept = residual.clone();
  const auto first = add_layer_norm(residual, {}, store.find("w"), store.find("b"), kEps);
  EXPECT_EQ(first.residual.data_ptr(), residual.data_ptr());
  const auto second =
      add_layer_norm(residual, first.normed, store.find("w"), store.find("b"), kEps);
  EXPECT_NE(second.residual.data_ptr(), residual.data_ptr());
  EXPECT_TRUE(at::equal(residual, kept));
}

TEST(AddLayerNorm, GradientOfACallerIsNotOverwritten) {
  PlainStore store(specs_of(8), {});
  const Tensor residual = leaf(normal({4, 8}, 1)), hidden = leaf(normal({4, 8}, 2));
  const Tensor g = normal({4, 8}, 3), kept = g.clone();
  const auto out = add_layer_norm(residual, hidden, store.find("w"), store.find("b"), kEps);
  torch::autograd::backward({out.residual, out.normed}, {g, g});
  EXPECT_TRUE(at::equal(g, kept));
}

TEST(AddLayerNorm, StridedInputs) {
  PlainStore store(specs_of(6), {});
  const Tensor wide = normal({5, 12}, 1), hidden = normal({6, 5}, 2).t();
  const auto norm = [&](const Tensor& x, const Tensor& y) {
    return add_layer_norm(x, y, store.find("w"), store.find("b"), kEps);
  };
  const auto a = norm(wide.narrow(1, 3, 6), hidden);
  const auto b = norm(wide.narrow(1, 3, 6).contiguous(), hidden.contiguous());
  EXPECT_TRUE(at::equal(a.normed, b.normed));
  EXPECT_TRUE(at::equal(a.residual, b.residual));
}

TEST(AddLayerNorm, GradientsDoNotDependOnThreads) {
  std::vector<Result> results;
  const int before = at::get_num_threads();
  for (const int threads : {1, 3}) {
    at::set_num_threads(threads);
    results.push_back(run(Path::kFused, {at::kFloat, at::kFloat}, {500, 96}, true, true));
  }
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(results[0].d_weight, results[1].d_weight));
  EXPECT_TRUE(at::equal(results[0].d_bias, results[1].d_bias));
}

TEST(AddLayerNorm, OneOfTwoFrozen) {
  for (const Path form : {Path::kFused, Path::kReference})
    for (const char* frozen : {"w", "b"}) {
      const PathGuard guard(form);
      PlainStore store(specs_of(8), {.frozen = {frozen}}), free(specs_of(8), {});
      for (PlainStore* s : {&store, &free}) {
        const Tensor x = leaf(normal({4, 8}, 1));
        run_backward(add_layer_norm(x, {}, s->find("w"), s->find("b"), kEps).normed,
                     normal({4, 8}, 2));
      }
      const std::string other = frozen == std::string("w") ? "b" : "w";
      EXPECT_FALSE(store.has_gradient(frozen));
      EXPECT_TRUE(at::equal(store.gradient_of(other), free.gradient_of(other)));
    }
}

TEST(AddLayerNorm, BadShapesAreRefused) {
  PlainStore store(specs_of(8), {});
  const auto norm = [&](const Tensor& x, const Tensor& y) {
    return add_layer_norm(x, y, store.find("w"), store.find("b"), kEps);
  };
  EXPECT_THROW((void)norm(normal({2, 9}, 1), {}), InternalError);
  EXPECT_THROW((void)norm(normal({2, 8}, 1), normal({3, 8}, 1)), InternalError);
  EXPECT_THROW((void)norm(normal({2, 8}, 1), normal({2, 8}, 1, at::kFloat)), InternalError);
}

}  // namespace
}  // namespace capstan::ops
