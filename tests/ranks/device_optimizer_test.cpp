// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Updates by our kernels on the fake device, which device_test.cpp installs.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/optim/optimizer.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::engine {
namespace {

// Weights, copy and states after three updates of two ranges.
std::vector<at::Tensor> updated(const recipe::Optimizer& recipe, at::ScalarType gradient,
                                at::ScalarType copy, at::Device device) {
  constexpr int64_t kCount = 8192;
  const auto wave = [&](double phase, at::ScalarType type) {
    return at::arange(kCount, at::kDouble).mul(0.37).add(phase).sin().to(type).to(device);
  };
  parallel::Shard shard;
  shard.master = wave(0.1, at::kFloat);
  shard.master.narrow(0, 7936, 256).zero_();  // padding
  shard.copy = at::zeros({kCount}, at::TensorOptions().dtype(copy).device(device));
  shard.gradient = wave(0.7, gradient);
  if (recipe.moments == "int8") shard.update = plan::UpdateKind::kRowBlock;
  shard.ranges = {{0, 4608, true, true, 100}, {4608, 7936, false, true, 0xfffffff0}};
  const auto optimizer = optim::make_optimizer(recipe, {shard});
  for (int64_t t = 1; t <= 3; ++t) {
    optimizer->step({.lr = 1e-2, .gradient_scale = 0.7, .count = t, .seed = 9});
    if (optimizer->wants_curvature(recipe.sophia.interval))
      optimizer->observe_curvature({.tokens = 1e3, .gradient_scale = 0.5, .count = t, .seed = 9});
  }
  std::vector<at::Tensor> result{shard.master.cpu(), shard.copy.cpu()};
  for (const auto& state : optimizer->states()) result.push_back(state.values.cpu());
  return result;
}

TEST(Device, EveryOptimizer_HasTheBitsOfTheCpu) {
  ops::install_device_kernels(&test::fake_kernels());
  const at::Device device = device::accelerator()->device();
  for (const auto& [name, moments] : {std::pair{"adamw", "auto"},
                                      {"adamw", "bf16"},
                                      {"adamw", "int8"},
                                      {"lion", "auto"},
                                      {"lion", "bf16"},
                                      {"lion", "int8"},
                                      {"sophia", "auto"},
                                      {"sophia", "bf16"},
                                      {"sophia", "int8"}})
    for (const auto& [gradient, copy] : {std::pair{at::kFloat, at::kBFloat16},
                                         {at::kBFloat16, at::kBFloat16},
                                         {at::kFloat, at::kHalf}}) {
      recipe::Optimizer recipe;
      recipe.name = name;
      recipe.moments = moments;
      const auto got = updated(recipe, gradient, copy, device),
                 want = updated(recipe, gradient, copy, at::kCPU);
      ASSERT_EQ(got.size(), want.size());
      for (size_t i = 0; i < got.size(); ++i)
        EXPECT_TRUE(got[i].equal(want[i])) << name << ", moments " << moments << ", tensor " << i;
    }
  ops::install_device_kernels(nullptr);
}

}  // namespace
}  // namespace capstan::engine
