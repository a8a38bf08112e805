// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/param/context.h"

namespace capstan::param {
namespace {

using ::testing::ElementsAre;

at::Tensor keys(const std::vector<int32_t>& values, int64_t rows) {
  return at::tensor(values, at::kInt).view({rows, -1});
}
std::vector<int32_t> starts_of(const DocumentStarts& documents) {
  const auto* const begin = documents.starts.const_data_ptr<int32_t>();
  return {begin, begin + documents.starts.numel()};
}

TEST(DocumentStarts, RowsFollowEachOther_EndsAreRepeated) {
  const auto two = document_starts(keys({0, 0, 0, 3, 0, 0, 2, 2}, 2));
  EXPECT_THAT(starts_of(two), ElementsAre(0, 3, 4, 6, 8));
  EXPECT_EQ(two.longest, 3);
  const auto three = document_starts(keys({0, 0, 0, 0, 0, 5, 6, 6}, 1));
  EXPECT_THAT(starts_of(three), ElementsAre(0, 5, 6, 8, 8));
  EXPECT_EQ(three.longest, 5);
}

TEST(DocumentStarts, OneDocumentAndOnesOfOneToken) {
  EXPECT_THAT(starts_of(document_starts(keys({0, 0, 0}, 1))), ElementsAre(0, 3));
  const auto ones = document_starts(keys({0, 1, 0, 1}, 2));
  EXPECT_THAT(starts_of(ones), ElementsAre(0, 1, 2, 3, 4));
  EXPECT_EQ(ones.longest, 1);
  EXPECT_EQ(ones.starts.scalar_type(), at::kInt);
}

// Documents of 3, 1 and 4 tokens, and one of 8, in four chunks of two tokens.
TEST(DocumentStarts, ChunksHaveWhatLiesInThem) {
  const auto two = document_starts(keys({0, 0, 0, 3, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0}, 2));
  ASSERT_THAT(starts_of(two), ElementsAre(0, 3, 4, 8, 16));
  const at::Tensor chunks_CE = chunk_starts(two.starts, 8, 4);
  EXPECT_EQ(chunks_CE.scalar_type(), at::kInt);
  const std::vector<std::vector<int32_t>> want = {
      {0, 2, 2, 2, 4}, {0, 1, 2, 2, 4}, {0, 0, 0, 2, 4}, {0, 0, 0, 2, 4}};
  for (int64_t c = 0; c < 4; ++c)
    EXPECT_TRUE(at::equal(chunks_CE[c], at::tensor(want[static_cast<size_t>(c)], at::kInt))) << c;
  EXPECT_TRUE(at::equal(chunk_starts(two.starts, 8, 1)[0], two.starts));
  EXPECT_THROW((void)chunk_starts(two.starts, 8, 3), InternalError);
}

TEST(DocumentStarts, KeysThatAreNoStartsAreRefused) {
  for (const auto& wrong :
       {std::vector<int32_t>{0, 0, 1, 1}, {1, 1, 2, 2}, {0, 0, 3, 3}, {0, 1, 0, 3}})
    EXPECT_THROW((void)document_starts(keys(wrong, 1)), DataError) << wrong[1];
  EXPECT_THROW((void)document_starts(at::zeros({1, 4}, at::kLong)), InternalError);
  EXPECT_THROW((void)document_starts(at::zeros({4}, at::kInt)), InternalError);
}

}  // namespace
}  // namespace capstan::param
