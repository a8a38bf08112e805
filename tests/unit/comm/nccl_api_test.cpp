// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/nccl_api.h"

#include <gtest/gtest.h>

namespace capstan::comm {
namespace {

TEST(NcclReductions, SumsKeepTheElementType) {
  const std::pair<at::ScalarType, NcclType> pairs[] = {
      {at::kDouble, NcclType::kFloat64},    {at::kFloat, NcclType::kFloat32},
      {at::kBFloat16, NcclType::kBfloat16}, {at::kHalf, NcclType::kFloat16},
      {at::kLong, NcclType::kInt64},        {at::kInt, NcclType::kInt32},
      {at::kChar, NcclType::kInt8},         {at::kByte, NcclType::kUint8}};
  for (const auto& [type, expected] : pairs) {
    const auto reduction = nccl_reduction_of(type, ReduceOp::kSum);
    ASSERT_TRUE(reduction.has_value()) << c10::toString(type);
    EXPECT_EQ(reduction->type, expected) << c10::toString(type);
    EXPECT_EQ(reduction->reduce, NcclReduce::kSum);
    EXPECT_EQ(nccl_reduction_of(type, ReduceOp::kMin)->reduce, NcclReduce::kMin);
    EXPECT_FALSE(nccl_reduction_of(type, ReduceOp::kOr).has_value());
  }
}

TEST(NcclReductions, OrOfFlagsIsTheirMaximum) {
  const auto reduction = nccl_reduction_of(at::kBool, ReduceOp::kOr);
  ASSERT_TRUE(reduction.has_value());
  EXPECT_EQ(reduction->type, NcclType::kUint8);
  EXPECT_EQ(reduction->reduce, NcclReduce::kMax);
  EXPECT_FALSE(nccl_reduction_of(at::kBool, ReduceOp::kSum).has_value());
}

TEST(NcclReductions, TypesThatNcclLacks_HaveNone) {
  for (const auto type : {at::kShort, at::kComplexFloat, at::kFloat8_e4m3fn})
    EXPECT_FALSE(nccl_reduction_of(type, ReduceOp::kSum).has_value());
}

}  // namespace
}  // namespace capstan::comm
