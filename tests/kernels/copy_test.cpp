// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

class Copy : public KernelTest {};

TEST_F(Copy, AnySizeAndAlignment_CopiesEveryByte) {
  for (const size_t bytes : {0u, 1u, 15u, 16u, 17u, 4096u, 100003u}) {
    for (const size_t shift : {0u, 1u}) {
      SCOPED_TRACE(testing::Message() << bytes << " bytes, shift " << shift);
      const Array from(DType::kUint8, random_ids(bytes, bytes, 256), shift);
      const auto out = same_bits([&] {
        std::vector<Array> to;
        to.push_back(Array::of_size(DType::kUint8, bytes));
        api().copy({from.data(), to[0].data(), static_cast<int64_t>(bytes)}, nullptr);
        return to;
      });
      EXPECT_EQ(out[0].bytes(), from.bytes());
    }
  }
}

}  // namespace
}  // namespace capstan::kernels::test
