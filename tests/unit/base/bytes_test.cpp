// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/bytes.h"

#include <gtest/gtest.h>

#include <limits>

#include "capstan/base/dtype.h"

namespace capstan {
namespace {

TEST(Bytes, Sizes_HaveThreeDigits) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1024), "1.00 KiB");
  EXPECT_EQ(format_bytes(19188941), "18.3 MiB");
  EXPECT_EQ(format_bytes(1095216660), "1.02 GiB");
  EXPECT_EQ(format_bytes(-2048), "-2.00 KiB");
  EXPECT_EQ(format_bytes(kMiB - 1), "1.00 MiB") << "1024 KiB would be the wrong unit";
  EXPECT_EQ(format_bytes(std::numeric_limits<int64_t>::max()), "8.00 EiB");
  EXPECT_EQ(format_bytes(std::numeric_limits<int64_t>::min()), "-8.00 EiB");
}

TEST(Bytes, Counts_AreGrouped) {
  EXPECT_EQ(format_count(0), "0");
  EXPECT_EQ(format_count(999), "999");
  EXPECT_EQ(format_count(5898240), "5,898,240");
  EXPECT_EQ(format_count(-123456), "-123,456");
}

TEST(Bytes, Durations_CarryIntoTheNextUnit) {
  EXPECT_EQ(format_duration(12.34), "12.3s");
  EXPECT_EQ(format_duration(59.97), "1m00s");
  EXPECT_EQ(format_duration(211), "3m31s");
  EXPECT_EQ(format_duration(3599.7), "1h00m");
  EXPECT_EQ(format_duration(7500), "2h05m");
  EXPECT_EQ(format_duration(86400 * 5 + 7200), "5d02h");
  EXPECT_EQ(format_duration(-12.34), "-12.3s");
  EXPECT_EQ(format_duration(std::numeric_limits<double>::infinity()), "?");
}

TEST(Bytes, CheckedArithmetic_SeesOverflow) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(checked_add(most - 1, 1), most);
  EXPECT_EQ(checked_add(most, 1), std::nullopt);
  EXPECT_EQ(checked_multiply(int64_t{1} << 31, int64_t{1} << 31), int64_t{1} << 62);
  EXPECT_EQ(checked_multiply(int64_t{1} << 32, int64_t{1} << 32), std::nullopt);
  EXPECT_EQ(round_up(257, 256), 512);
  EXPECT_EQ(round_up(256, 256), 256);
}

TEST(DType, Names_GoBothWays) {
  for (const DType dtype :
       {DType::kFp64, DType::kFp32, DType::kBf16, DType::kFp16, DType::kInt64, DType::kInt32,
        DType::kInt16, DType::kInt8, DType::kUint8, DType::kUint16, DType::kBool}) {
    EXPECT_EQ(dtype_from_name(name_of(dtype)), dtype);
    EXPECT_EQ(dtype_from_safetensors(safetensors_name_of(dtype)), dtype);
  }
  EXPECT_EQ(size_of(DType::kBf16), 2u);
  EXPECT_EQ(size_of(DType::kFp64), 8u);
  EXPECT_EQ(dtype_from_name("float32"), std::nullopt);
}

}  // namespace
}  // namespace capstan
