// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/norm.h"

#include <gtest/gtest.h>

#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;

constexpr double kEps = 1e-5;

struct Case {
  at::ScalarType residual, compute;
  bool keeps_weight = false;  // in fp32
};
struct Result {
  Tensor residual, normed, d_residual, d_hidden, d_weight;
};

Result run(Path form, Case c, at::IntArrayRef sizes, bool with_hidden, bool use_residual) {
  const PathGuard guard(form);
  plan::ParamSpec spec = param_spec("w", {sizes.back()});
  spec.wide = c.keeps_weight;
  PlainStore store({spec}, {.values = c.compute,
                            .gradients = c.compute == at::kDouble ? at::kDouble : at::kFloat,
                            .wide = at::kFloat});
  const Tensor residual = leaf(normal(sizes, 1, c.residual));
  const Tensor hidden = with_hidden ? leaf(normal(sizes, 2, c.compute)) : Tensor();
  const auto out = add_rms_norm(residual, hidden, store.find("w"), kEps);
  Tensor total = (out.normed.to(at::kDouble) * normal(sizes, 3)).sum();
  if (use_residual) total = total + (out.residual.to(at::kDouble) * normal(sizes, 4)).sum();
  torch::autograd::backward({total}, {});
  return {out.residual, out.normed, residual.grad(), with_hidden ? hidden.grad() : Tensor(),
          store.gradient_of("w")};
}

TEST(AddRmsNorm, KernelMatchesReference_EveryDtypeAndOddSizes) {
  for (const Case c : {Case{at::kDouble, at::kDouble}, Case{at::kFloat, at::kFloat},
                       Case{at::kFloat, at::kBFloat16}, Case{at::kBFloat16, at::kBFloat16},
                       Case{at::kFloat, at::kHalf}, Case{at::kFloat, at::kBFloat16, true},
                       Case{at::kBFloat16, at::kBFloat16, true}})
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
            ASSERT_TRUE(testing::near(a.residual, b.residual));
            ASSERT_TRUE(testing::near(a.normed, b.normed));
            ASSERT_TRUE(testing::near(a.d_residual, b.d_residual));
            ASSERT_TRUE(testing::near(a.d_hidden, b.d_hidden));
            ASSERT_TRUE(testing::near(a.d_weight, b.d_weight));
            ASSERT_EQ(a.normed.scalar_type(), c.compute);
            ASSERT_EQ(a.residual.scalar_type(), c.residual);
          }
}

TEST(AddRmsNorm, GradientsMatchDifferences) {
  for (const Path form : {Path::kFused, Path::kReference}) {
    const PathGuard guard(form);
    PlainStore store({param_spec("w", {11})}, {});
    const Tensor residual = leaf(normal({2, 3, 11}, 1)), hidden = leaf(normal({2, 3, 11}, 2));
    const Tensor wr = normal({2, 3, 11}, 3), wn = normal({2, 3, 11}, 4);
    const auto out = add_rms_norm(residual, hidden, store.find("w"), kEps);
    torch::autograd::backward({(out.residual * wr).sum() + (out.normed * wn).sum()}, {});
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      const auto o = add_rms_norm(residual, hidden, store.find("w"), kEps);
      return weighted_sum(o.residual, wr) + weighted_sum(o.normed, wn);
    };
    EXPECT_TRUE(testing::is_gradient(loss, residual.detach(), residual.grad()));
    EXPECT_TRUE(testing::is_gradient(loss, hidden.detach(), hidden.grad()));
    EXPECT_TRUE(testing::is_gradient(loss, store.value_of("w"), store.gradient_of("w")));
  }
}

TEST(AddRmsNorm, InputsStayAndResidualAloneIsShared) {
  PlainStore store({param_spec("w", {8})}, {.values = at::kFloat, .gradients = at::kFloat});
  const Tensor residual = normal({4, 8}, 1, at::kFloat), kept = residual.clone();
  const auto first = add_rms_norm(residual, {}, store.find("w"), kEps);
  EXPECT_EQ(first.residual.data_ptr(), residual.data_ptr());
  const auto second = add_rms_norm(residual, first.normed, store.find("w"), kEps);
  EXPECT_NE(second.residual.data_ptr(), residual.data_ptr());
  EXPECT_TRUE(at::equal(residual, kept));
}

TEST(AddRmsNorm, GradientOfACallerIsNotOverwritten) {
  PlainStore store({param_spec("w", {8})}, {});
  const Tensor residual = leaf(normal({4, 8}, 1)), hidden = leaf(normal({4, 8}, 2));
  const Tensor g = normal({4, 8}, 3), kept = g.clone();
  const auto out = add_rms_norm(residual, hidden, store.find("w"), kEps);
  torch::autograd::backward({out.residual, out.normed}, {g, g});
  EXPECT_TRUE(at::equal(g, kept));
}

TEST(AddRmsNorm, StridedInputs) {
  PlainStore store({param_spec("w", {6})}, {});
  const Tensor wide = normal({5, 12}, 1), hidden = normal({6, 5}, 2).t();
  const auto a = add_rms_norm(wide.narrow(1, 3, 6), hidden, store.find("w"), kEps);
  const auto b =
      add_rms_norm(wide.narrow(1, 3, 6).contiguous(), hidden.contiguous(), store.find("w"), kEps);
  EXPECT_TRUE(at::equal(a.normed, b.normed));
  EXPECT_TRUE(at::equal(a.residual, b.residual));
}

TEST(AddRmsNorm, WeightGradientDoesNotDependOnThreads) {
  std::vector<Tensor> grads;
  const int before = at::get_num_threads();
  for (const int threads : {1, 3}) {
    at::set_num_threads(threads);
    grads.push_back(run(Path::kFused, {at::kFloat, at::kFloat}, {500, 96}, true, true).d_weight);
  }
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(grads[0], grads[1]));
}

}  // namespace
}  // namespace capstan::ops
