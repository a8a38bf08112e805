// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/isa.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "device/isa_internal.h"

namespace capstan::device {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string refusal(Isa detected, const std::string& asked) {
  try {
    (void)choose_isa(detected, asked);
  } catch (const EnvError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(IsaLevel, WithoutRequest_IsWhatTheProcessorHas) {
  EXPECT_EQ(choose_isa(Isa::kAvx512, std::nullopt), Isa::kAvx512);
}

TEST(IsaLevel, LowerLevel_IsHonoured) {
  EXPECT_EQ(choose_isa(Isa::kAvx512Bf16, "plain"), Isa::kPlain);
  EXPECT_EQ(choose_isa(Isa::kAvx512Bf16, "avx2"), Isa::kAvx2);
  EXPECT_EQ(choose_isa(Isa::kAvx2, "avx2"), Isa::kAvx2);
}

TEST(IsaLevel, HigherThanTheProcessor_IsRefused) {
  EXPECT_THAT(refusal(Isa::kAvx2, "avx512"),
              AllOf(HasSubstr("CAPSTAN_ISA"), HasSubstr("avx512"), HasSubstr("avx2 or lower")));
}

TEST(IsaLevel, UnknownName_IsRefusedWithTheList) {
  EXPECT_THAT(refusal(Isa::kAvx512, "sse9"),
              AllOf(HasSubstr("CAPSTAN_ISA"), HasSubstr("'sse9'"),
                    HasSubstr("plain, avx2, avx512, avx512bf16, amx")));
  EXPECT_THAT(refusal(Isa::kAvx512, ""), HasSubstr("CAPSTAN_ISA"));
}

TEST(IsaLevel, Detection_AgreesWithTheKernelsFlags) {
  const Isa isa = detect_isa();
  EXPECT_EQ(isa >= Isa::kAvx2, cpu_has("avx2") && cpu_has("fma"));
  EXPECT_EQ(isa >= Isa::kAvx512, cpu_has("avx512f") && cpu_has("avx512bw") && cpu_has("avx512dq") &&
                                     cpu_has("avx512vl"));
  EXPECT_TRUE(isa < Isa::kAmx || (cpu_has("amx_tile") && cpu_has("amx_bf16")));
}

}  // namespace
}  // namespace capstan::device
