// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/block_backward_internal.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>

#include "capstan/ops/record.h"

namespace capstan::engine {
namespace {

Tensor leaf(std::initializer_list<double> values) {
  return at::tensor(values, at::kDouble).requires_grad_(true);
}

// y = 2 x; visits an anchor.
struct Probe : torch::autograd::Function<Probe> {
  static inline int visits = 0;
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& x, const Tensor&) {
    return x.mul(2);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list gradients) {
    ++visits;
    return {gradients[0].mul(2), Tensor()};
  }
};

TEST(BlockBackward, SumsTheGradientsOfAllRoots) {
  const Tensor x = leaf({1, 2}), y = leaf({3, 4});
  Roots roots;
  roots.add(x.mul(y), at::tensor({1.0, 10.0}, at::kDouble));
  roots.add(x.add(1), at::tensor({100.0, 100.0}, at::kDouble));
  const auto gradients = differentiate(std::move(roots), {x, y}, {});
  EXPECT_TRUE(gradients[0].equal(at::tensor({103.0, 140.0}, at::kDouble)));
  EXPECT_TRUE(gradients[1].equal(at::tensor({1.0, 20.0}, at::kDouble)));
  EXPECT_FALSE(x.grad().defined());
}

TEST(BlockBackward, LeafOutsideTheGraph_HasNoGradient) {
  const Tensor x = leaf({1}), unused = leaf({2});
  Roots roots;
  roots.add(x.mul(3), at::ones({1}, at::kDouble));
  const auto gradients = differentiate(std::move(roots), {unused, x}, {});
  EXPECT_FALSE(gradients[0].defined());
  EXPECT_EQ(gradients[1].item<double>(), 3);
}

TEST(BlockBackward, OpWithAnAnchor_IsVisitedWithoutAnyLeaf) {
  const Tensor anchor = at::empty({0}, at::kFloat).requires_grad_(true);
  const Tensor ids = at::ones({2}, at::kDouble);  // as token ids: no gradient
  Probe::visits = 0;
  Roots roots;
  roots.add(Probe::apply(ids, anchor), at::ones({2}, at::kDouble));
  EXPECT_TRUE(differentiate(std::move(roots), {}, {anchor}).empty());
  EXPECT_EQ(Probe::visits, 1);
}

TEST(BlockBackward, GradientReachesTheFirstOpAlone) {
  const Tensor x = leaf({1, 2});
  size_t holders = 0;
  const Tensor y = ops::record(x.detach().mul(2), {.name = "probe",
                                                   .inputs = {x},
                                                   .params = {},
                                                   .saved = {},
                                                   .backward = [&](const auto&, auto& gradients) {
                                                     const Tensor g = std::move(gradients[0]);
                                                     holders = g.use_count();
                                                     return ops::Tensors{g.mul(2)};
                                                   }});
  Roots roots;
  roots.add(y, at::ones({2}, at::kDouble));
  const auto gradients = differentiate(std::move(roots), {x}, {});
  EXPECT_EQ(holders, 1U);
  EXPECT_TRUE(gradients[0].equal(at::full({2}, 2.0, at::kDouble)));
}

TEST(BlockBackward, RootsWithoutGradientOrGraph_GiveNothing) {
  const Tensor x = leaf({1});
  Roots roots;
  roots.add(x.mul(2), Tensor());
  roots.add(at::ones({1}), at::ones({1}));
  EXPECT_TRUE(roots.tensors.empty());
  EXPECT_FALSE(differentiate(std::move(roots), {x}, {})[0].defined());
}

}  // namespace
}  // namespace capstan::engine
