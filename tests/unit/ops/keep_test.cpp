// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/keep.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/norm.h"
#include "capstan/ops/record.h"
#include "capstan/ops/swiglu.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

// A norm, and a gated MLP on it: the layer half that selective recompute is about.
struct Mlp {
  testing::PlainStore store{
      {param_spec("norm", {8}), param_spec("up", {12, 8}), param_spec("down", {8, 6})}, {}};
  int forwards = 0;

  [[nodiscard]] Tensor inner(const Tensor& x) {
    ++forwards;
    return swiglu(linear(x, Projection{.parts = {store.find("up")}}));
  }
  [[nodiscard]] Tensor run(const Tensor& x, bool again, NormOutput norm) {
    const auto normed = add_rms_norm(x, {}, store.find("norm"), 1e-5, norm).normed;
    const Tensor act = again ? remake(normed, [this](const Tensor& in, bool) { return inner(in); })
                             : inner(normed);
    return linear(act, Projection{.parts = {store.find("down")}});
  }
  // Output, gradient of x, gradients of the weights.
  [[nodiscard]] Tensors numbers(bool again, NormOutput norm, Keeper* keeper = nullptr) {
    store.clear_gradients();
    const Tensor x = leaf(normal({5, 8}, 1));
    Tensor y;
    {
      const KeeperGuard guard(keeper);
      y = run(x, again, norm);
    }
    run_backward(y, normal({5, 8}, 2));
    return {y.detach(), x.grad(), store.gradient_of("norm").clone(),
            store.gradient_of("up").clone(), store.gradient_of("down").clone()};
  }
};

void expect_same_bits(const Tensors& a, const Tensors& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i], b[i])) << i;
}

TEST(Keep, WhatIsMadeAgainGivesTheSameBits) {
  Mlp mlp;
  const Tensors plain = mlp.numbers(false, NormOutput::kKept);
  EXPECT_EQ(mlp.forwards, 1);
  for (const bool again : {false, true})
    for (const NormOutput norm : {NormOutput::kKept, NormOutput::kRemade}) {
      mlp.forwards = 0;
      expect_same_bits(plain, mlp.numbers(again, norm));
      EXPECT_EQ(mlp.forwards, again ? 2 : 1);
    }
}

using Weak = c10::weak_intrusive_ptr<c10::StorageImpl>;

TEST(Keep, NothingOfARemadePartOutlivesTheForward) {
  std::vector<Weak> inside;
  Tensor y;
  Mlp mlp;
  const Tensor x = leaf(normal({5, 8}, 1));
  {
    const auto norm = add_rms_norm(x, {}, mlp.store.find("norm"), 1e-5, NormOutput::kRemade);
    inside.push_back(norm.normed.storage().getWeakStorageImpl());
    const Tensor act = remake(norm.normed, [&](const Tensor& in, bool) {
      const Tensor up = linear(in, Projection{.parts = {mlp.store.find("up")}});
      inside.push_back(up.storage().getWeakStorageImpl());
      return swiglu(up);
    });
    inside.push_back(act.storage().getWeakStorageImpl());
    y = linear(act, Projection{.parts = {mlp.store.find("down")}});
  }
  ASSERT_EQ(inside.size(), 3U);
  for (const Weak& storage : inside) EXPECT_TRUE(storage.expired());
  run_backward(y, normal({5, 8}, 2));
  ASSERT_EQ(inside.size(), 4U);  // one more from the second run
  EXPECT_TRUE(inside.back().expired());
}

TEST(Keep, ReshapedNormIsMadeAgainToo) {
  testing::PlainStore store({param_spec("norm", {8}), param_spec("w", {3, 8})}, {});
  const auto numbers = [&](NormOutput output) {
    store.clear_gradients();
    const Tensor x = leaf(normal({2, 3, 8}, 1));
    Tensor y;
    Weak normed = Weak(c10::intrusive_ptr<c10::StorageImpl>());
    {
      const auto norm = add_rms_norm(x, {}, store.find("norm"), 1e-5, output);
      normed = norm.normed.storage().getWeakStorageImpl();
      y = linear(norm.normed.reshape({6, 8}), Projection{.parts = {store.find("w")}});
    }
    EXPECT_EQ(normed.expired(), output == NormOutput::kRemade);
    run_backward(y, normal({6, 3}, 2));
    return Tensors{x.grad(), store.gradient_of("w").clone(), store.gradient_of("norm").clone()};
  };
  expect_same_bits(numbers(NormOutput::kKept), numbers(NormOutput::kRemade));
}

TEST(Keep, WithoutGradientsAPartRunsOnce) {
  Mlp mlp;
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(mlp.run(normal({5, 8}, 1), true, NormOutput::kRemade).requires_grad());
  EXPECT_EQ(mlp.forwards, 1);
}

TEST(Keep, ASecondRunThatSavesOtherwiseIsNoticed) {
  Mlp mlp;
  const Tensor x = leaf(normal({5, 8}, 1));
  const Tensor y = remake(x, [&](const Tensor& in, bool again) {
    const Tensor out = mlp.inner(in);
    return again ? linear(out, Projection{.parts = {mlp.store.find("down")}}) : out;
  });
  EXPECT_THROW(run_backward(y, normal({5, 6}, 2)), InternalError);
  EXPECT_THROW((void)remake(x,
                            [&](const Tensor& in, bool) {
                              return remake(in, [](const Tensor& t, bool) { return t * 1; });
                            }),
               InternalError);
}

// Keeps everything as copies, and counts.
struct Copies final : Keeper {
  struct Copy final : Kept {
    Tensor tensor;
    Tensor get() override { return tensor; }
  };
  int made = 0;
  std::unique_ptr<Kept> keep(const Tensor& tensor) override {
    ++made;
    auto copy = std::make_unique<Copy>();
    copy->tensor = tensor.clone();
    return copy;
  }
};

TEST(Keep, AKeeperGetsWhatIsNotMadeAgain) {
  Mlp mlp;
  const Tensors plain = mlp.numbers(false, NormOutput::kKept);
  Copies all, few;
  expect_same_bits(plain, mlp.numbers(false, NormOutput::kKept, &all));
  EXPECT_EQ(all.made, 5);  // residual, scale; inputs of up, gate and down
  expect_same_bits(plain, mlp.numbers(true, NormOutput::kRemade, &few));
  EXPECT_EQ(few.made, 2);  // residual, scale
}

}  // namespace
}  // namespace capstan::ops
