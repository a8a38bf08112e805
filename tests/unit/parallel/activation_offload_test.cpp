// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/activation_offload.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace capstan::parallel {
namespace {

TEST(ActivationOffload, CopiesLargeTensorsAndLeavesSmallOnes) {
  ActivationOffload offload;
  const Tensor large = at::randn({32, 8}), small = at::randn({8});
  const auto kept = offload.keep(large);
  ASSERT_TRUE(kept);
  EXPECT_FALSE(offload.keep(small));
  EXPECT_TRUE(at::equal(kept->get(), large));
  EXPECT_NE(kept->get().data_ptr(), large.data_ptr());
}

TEST(ActivationOffload, WhatTwoOpsSaveIsCopiedOnce) {
  ActivationOffload offload;
  const Tensor whole = at::randn({64, 16});
  const auto first = offload.copy(whole), second = offload.copy(whole.detach());
  EXPECT_EQ(first.get(), second.get());
  const Tensor half = whole.narrow(0, 32, 32), turned = whole.view({16, 64});
  EXPECT_TRUE(at::equal(offload.copy(half)->get(), half));
  EXPECT_TRUE(at::equal(offload.copy(turned)->get(), turned));
  (void)offload.end_block();
  EXPECT_NE(offload.copy(whole).get(), first.get());
}

TEST(ActivationOffload, AnAddressThatIsUsedAgainIsAnotherTensor) {
  ActivationOffload offload;
  std::vector<float> memory(512, 1.0F);
  const auto tensor_here = [&] { return at::from_blob(memory.data(), {512}, at::kFloat); };
  const auto ones = offload.copy(tensor_here());
  std::fill(memory.begin(), memory.end(), 2.0F);
  const auto twos = offload.copy(tensor_here());
  EXPECT_TRUE(at::equal(ones->get(), at::ones({512})));
  EXPECT_TRUE(at::equal(twos->get(), at::full({512}, 2.0F)));
}

TEST(ActivationOffload, StridesSurvive) {
  ActivationOffload offload;
  const Tensor x = at::randn({16, 64}).t();
  const Tensor back = offload.copy(x)->get();
  EXPECT_TRUE(at::equal(back, x));
  EXPECT_EQ(back.strides(), x.strides());
}

}  // namespace
}  // namespace capstan::parallel
