// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/block_backward_internal.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>

#include "capstan/ops/record.h"
#include "engine/block_io_internal.h"

namespace capstan::engine {
namespace {

Tensor leaf(std::initializer_list<double> values) {
  return at::tensor(values, at::kDouble).requires_grad_(true);
}

// Two tensors at the foot of a graph.
struct Inputs {
  GraphInput graph;
  Tensor x, y;
  Inputs(Tensor first, Tensor second)
      : graph(start_graph({std::move(first), std::move(second), {}})),
        x(graph.io.hidden_BTD),
        y(graph.io.residual_BTD) {}
};

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
  const Inputs in(leaf({1, 2}), leaf({3, 4}));
  Roots roots;
  roots.add(root_of(in.x.mul(in.y)), at::tensor({1.0, 10.0}, at::kDouble));
  roots.add(root_of(in.x.add(1)), at::tensor({100.0, 100.0}, at::kDouble));
  const auto gradients = differentiate(std::move(roots), in.graph.edges, {});
  EXPECT_TRUE(gradients[0].equal(at::tensor({103.0, 140.0}, at::kDouble)));
  EXPECT_TRUE(gradients[1].equal(at::tensor({1.0, 20.0}, at::kDouble)));
}

TEST(BlockBackward, InputOutsideTheGraph_HasNoGradient) {
  const Inputs in(leaf({2}), leaf({1})), others(leaf({5}), Tensor());
  Roots roots;
  roots.add(root_of(in.y.mul(3)), at::ones({1}, at::kDouble));
  auto edges = in.graph.edges;
  edges.insert(edges.end(), others.graph.edges.begin(), others.graph.edges.end());
  const auto gradients = differentiate(std::move(roots), edges, {});
  ASSERT_EQ(gradients.size(), 4U);
  EXPECT_FALSE(gradients[0].defined());
  EXPECT_EQ(gradients[1].item<double>(), 3);
  EXPECT_FALSE(gradients[2].defined());
  EXPECT_FALSE(gradients[3].defined());
}

TEST(BlockBackward, InputThatWantsNoGradient_IsCutOff) {
  const Inputs in(at::ones({1}, at::kDouble), leaf({4}));
  EXPECT_FALSE(in.x.requires_grad());
  Roots roots;
  roots.add(root_of(in.x.mul(in.y)), at::ones({1}, at::kDouble));
  const auto gradients = differentiate(std::move(roots), in.graph.edges, {});
  EXPECT_FALSE(gradients[0].defined());
  EXPECT_EQ(gradients[1].item<double>(), 1);
}

// Only what ops save is kept between forward and backward.
TEST(BlockBackward, GraphHoldsNeitherItsInputsNorItsResults) {
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> handed_on;
  std::vector<Edge> leaves, ends;
  {
    const Inputs in(leaf({1, 2}), leaf({3, 4}));
    const Tensor sum = in.x.add(in.y);
    for (const Tensor& t : {in.x, in.y, sum}) handed_on.push_back(t.storage().getWeakStorageImpl());
    leaves = in.graph.edges;
    ends = roots_of({sum, Tensor(), {}});
  }
  for (const auto& storage : handed_on) EXPECT_TRUE(storage.expired());
  Roots roots;
  for (Edge& end : ends) roots.add(std::move(end), at::ones({2}, at::kDouble));
  for (const Tensor& gradient : differentiate(std::move(roots), leaves, {}))
    EXPECT_TRUE(gradient.equal(at::ones({2}, at::kDouble)));
}

TEST(BlockBackward, OpWithAnAnchor_IsVisitedWithoutAnyLeaf) {
  const Tensor anchor = at::empty({0}, at::kFloat).requires_grad_(true);
  const Tensor ids = at::ones({2}, at::kDouble);  // as token ids: no gradient
  Probe::visits = 0;
  Roots roots;
  roots.add(root_of(Probe::apply(ids, anchor)), at::ones({2}, at::kDouble));
  EXPECT_TRUE(differentiate(std::move(roots), {}, {anchor}).empty());
  EXPECT_EQ(Probe::visits, 1);
}

TEST(BlockBackward, GradientReachesTheFirstOpAlone) {
  const Inputs in(leaf({1, 2}), Tensor());
  const Tensor x = in.x;
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
  roots.add(root_of(y), at::ones({2}, at::kDouble));
  const auto gradients = differentiate(std::move(roots), in.graph.edges, {});
  EXPECT_EQ(holders, 1U);
  EXPECT_TRUE(gradients[0].equal(at::full({2}, 2.0, at::kDouble)));
}

TEST(BlockBackward, RootsWithoutGradientOrGraph_GiveNothing) {
  const Inputs in(leaf({1}), Tensor());
  Roots roots;
  roots.add(root_of(in.x.mul(2)), Tensor());
  roots.add(root_of(at::ones({1})), at::ones({1}));
  EXPECT_TRUE(roots.edges.empty());
  EXPECT_FALSE(differentiate(std::move(roots), in.graph.edges, {})[0].defined());
}

}  // namespace
}  // namespace capstan::engine
