// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/rows.h"

#include <gmock/gmock.h>

#include "capstan/data/loader.h"
#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

SampleBatch read_row_of(const RowSpace& rows, int64_t row) {
  SampleBatch batch = make_batch(1, rows.sequence_length());
  rows.read(row, batch.row(0));
  return batch;
}

std::shared_ptr<const TokenFile> open(const Path& prefix) {
  return std::make_shared<const TokenFile>(prefix);
}

TEST(RowSpace, CountsRows) {
  const TempFolder folder;
  for (int32_t tokens = 5; tokens < 30; ++tokens) {
    write_ramp(folder / "a", tokens);
    EXPECT_EQ(RowSpace(open(folder / "a"), 4, Documents::kJoined, false).rows(), (tokens - 1) / 4);
    EXPECT_EQ(RowSpace(open(folder / "a"), 4, Documents::kJoined, true).rows(),
              (tokens - 1 + 3) / 4);
  }
}

TEST(RowSpace, EveryTokenButTheFirstIsATargetOnce) {
  const TempFolder folder;
  write_ramp(folder / "a", 19);
  const RowSpace rows(open(folder / "a"), 4, Documents::kJoined, true);
  std::vector<int64_t> targets;
  for (int64_t row = 0; row < rows.rows(); ++row) {
    const SampleBatch batch = read_row_of(rows, row);
    for (size_t i = 0; i < 4; ++i) {
      if (batch.targets[i] == kIgnoreTarget) continue;
      EXPECT_EQ(batch.targets[i], batch.tokens[i] + 1);
      targets.push_back(batch.targets[i]);
    }
  }
  std::vector<int64_t> expected(18);
  std::iota(expected.begin(), expected.end(), 1);
  EXPECT_EQ(targets, expected);
}

TEST(RowSpace, JoinedRows_CrossDocuments) {
  const TempFolder folder;
  write_pair(folder / "a", {{1, 2}, {3, 4, 5}, {6, 7}});
  const RowSpace rows(open(folder / "a"), 3, Documents::kJoined, false);
  const SampleBatch batch = read_row_of(rows, 1);
  EXPECT_THAT(batch.tokens, ElementsAre(4, 5, 6));
  EXPECT_THAT(batch.targets, ElementsAre(5, 6, 7));
  EXPECT_THAT(batch.positions, ElementsAre(0, 1, 2));
  EXPECT_THAT(batch.document_ids, ElementsAre(0, 0, 0));
}

TEST(RowSpace, SeparateRows_RestartAndMaskTheFirstTokenOfADocument) {
  const TempFolder folder;
  write_pair(folder / "a", {{1, 2}, {3, 4, 5}, {}, {6, 7, 8, 9, 10}});
  const RowSpace rows(open(folder / "a"), 4, Documents::kSeparate, true);
  const SampleBatch first = read_row_of(rows, 0);
  EXPECT_THAT(first.tokens, ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(first.targets, ElementsAre(2, kIgnoreTarget, 4, 5));
  EXPECT_THAT(first.positions, ElementsAre(0, 1, 0, 1));
  EXPECT_THAT(first.document_ids, ElementsAre(0, 0, 1, 1));
  const SampleBatch second = read_row_of(rows, 1);  // starts inside document 1; document 2 is empty
  EXPECT_THAT(second.tokens, ElementsAre(5, 6, 7, 8));
  EXPECT_THAT(second.targets, ElementsAre(kIgnoreTarget, 7, 8, 9));
  EXPECT_THAT(second.positions, ElementsAre(0, 0, 1, 2));
  EXPECT_THAT(second.document_ids, ElementsAre(1, 3, 3, 3));
  const SampleBatch last = read_row_of(rows, 2);
  EXPECT_THAT(last.tokens, ElementsAre(9, 0, 0, 0));
  EXPECT_THAT(last.targets, ElementsAre(10, kIgnoreTarget, kIgnoreTarget, kIgnoreTarget));
  EXPECT_THAT(last.positions, ElementsAre(0, 0, 1, 2));
  EXPECT_THAT(last.document_ids, ElementsAre(3, -1, -1, -1));
}

// Against a plain walk over all tokens, for random documents and lengths.
TEST(RowSpace, SeparateRows_EqualAPlainWalk) {
  const TempFolder folder;
  std::vector<Document> documents;
  std::vector<int64_t> ids, owner;
  for (int64_t d = 0; d < 60; ++d) {
    Document document(static_cast<size_t>(d * 7919 % 13));
    for (int32_t& token : document) {
      token = static_cast<int32_t>(ids.size());
      ids.push_back(token);
      owner.push_back(d);
    }
    documents.push_back(document);
  }
  write_pair(folder / "a", documents);
  for (const int64_t length : {1, 2, 5, 16, 64}) {
    const RowSpace rows(open(folder / "a"), length, Documents::kSeparate, false);
    for (int64_t row = 0; row < rows.rows(); ++row) {
      const SampleBatch batch = read_row_of(rows, row);
      int64_t position = 0;
      for (int64_t i = 0; i < length; ++i) {
        const auto at = static_cast<size_t>(row * length + i), out = static_cast<size_t>(i);
        position = i == 0 || owner[at] != owner[at - 1] ? 0 : position + 1;
        ASSERT_EQ(batch.tokens[out], ids[at]);
        ASSERT_EQ(batch.document_ids[out], owner[at]);
        ASSERT_EQ(batch.positions[out], position);
        ASSERT_EQ(batch.targets[out], owner[at + 1] == owner[at] ? ids[at + 1] : kIgnoreTarget);
      }
    }
  }
}

TEST(RowSpace, ShorterThanOneSequence_IsRefused) {
  const TempFolder folder;
  write_ramp(folder / "a", 16);
  const std::string text =
      message_of<ConfigError>([&] { RowSpace(open(folder / "a"), 16, Documents::kJoined, false); });
  EXPECT_THAT(text, HasSubstr("16 tokens"));
  EXPECT_THAT(text, HasSubstr("at least 17"));
  EXPECT_THAT(text, HasSubstr("batch.sequence_length"));
  EXPECT_NO_THROW(RowSpace(open(folder / "a"), 15, Documents::kJoined, false));
  EXPECT_NO_THROW(RowSpace(open(folder / "a"), 16, Documents::kJoined, true));
}

TEST(Documents, Names) {
  EXPECT_EQ(parse_documents("joined"), Documents::kJoined);
  EXPECT_EQ(parse_documents("separate"), Documents::kSeparate);
  EXPECT_THROW((void)parse_documents("apart"), ConfigError);
}

}  // namespace
}  // namespace capstan::data
