// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/validation.h"

#include <gmock/gmock.h>

#include <cmath>
#include <map>

#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ValidationSet, LastRowIsPadded_RowsOutsideWeighNothing) {
  const TempFolder folder;
  write_ramp(folder / "v", 11);
  const ValidationSet set(
      {.name = "heldout", .path = (folder / "v").string(), .sequence_length = 4});
  EXPECT_EQ(set.name(), "heldout");
  ASSERT_EQ(set.rows(), 3);
  const SampleBatch batch = set.read(1, 3);
  EXPECT_THAT(batch.valid, ElementsAre(1, 1, 0));
  EXPECT_THAT(batch.global_sample, ElementsAre(1, 2, -1));
  EXPECT_THAT(batch.targets, ElementsAre(5, 6, 7, 8, 9, 10, -100, -100, -100, -100, -100, -100));
  EXPECT_EQ(batch.target_tokens(), 6);
  EXPECT_EQ(set.read(0, set.rows()).target_tokens(), 10);
  EXPECT_FALSE(set.bytes_per_token().has_value());
}

TEST(ValidationSet, ChosenRowsAreSpreadEvenly) {
  const TempFolder folder;
  write_ramp(folder / "v", 101);
  const ValidationSet set({.path = (folder / "v").string(), .sequence_length = 10});
  EXPECT_THAT(set.choose_rows(4), ElementsAre(0, 2, 5, 7));
  EXPECT_EQ(set.choose_rows(std::nullopt).size(), 10u);
  EXPECT_EQ(set.choose_rows(1000).size(), 10u);
  EXPECT_THAT(set.choose_rows(1), ElementsAre(0));
}

TEST(ValidationSet, BytesPerToken_ComesFromThePreparedText) {
  const TempFolder folder;
  spill(folder / "in" / "x.txt", "hello");
  spill(folder / "in" / "y.txt", "worlds!");
  PrepareOptions options;
  options.inputs = {(folder / "in").string()};
  options.output = (folder / "v").string();
  (void)prepare_with(options, byte_encoder());
  const ValidationSet set({.path = options.output, .sequence_length = 4});
  EXPECT_DOUBLE_EQ(set.bytes_per_token().value(), 12.0 / 14.0);  // two end tokens carry no bytes
}

TEST(ValidationSet, IdsOutsideTheVocabulary_AreRefused) {
  const TempFolder folder;
  write_ramp(folder / "v", 11);
  const ValidationSet set(
      {.path = (folder / "v").string(), .sequence_length = 4, .vocab_size = 10});
  EXPECT_NO_THROW((void)set.read(0, 2));
  EXPECT_THAT(message_of<DataError>([&] { (void)set.read(2, 1); }),
              HasSubstr("token id 10 at token 10"));
}

TEST(UnigramModel, EqualsADirectComputation) {
  const TempFolder folder;
  std::vector<Document> train, held_out;
  std::map<int32_t, int64_t> counts;
  int64_t total = 0;
  for (int32_t d = 0; d < 40; ++d) {
    Document document;
    for (int32_t i = 0; i < 50 + d; ++i) document.push_back(i * i * (d + 1) % 97);
    for (const int32_t token : document) ++counts[token];
    total += std::ssize(document);
    (d % 5 == 0 ? held_out : train).push_back(document);
    if (d % 5 == 0) {
      for (const int32_t token : document) --counts[token];
      total -= std::ssize(document);
    }
  }
  write_pair(folder / "t", train);
  write_pair(folder / "v", held_out);
  constexpr int64_t kVocab = 128;
  for (const Documents documents : {Documents::kJoined, Documents::kSeparate}) {
    std::vector<int64_t> targets;  // in order, by hand
    for (size_t d = 0; d < held_out.size(); ++d) {
      for (size_t i = 0; i < held_out[d].size(); ++i) {
        if (i == 0 && (d == 0 || documents == Documents::kSeparate)) continue;
        targets.push_back(held_out[d][i]);
      }
    }
    double sum = 0;
    for (const int64_t target : targets) {
      const double p = double(counts[int32_t(target)] + 1) / double(total + kVocab);
      sum -= std::log(p);
    }
    const ValidationSet set({.path = (folder / "v").string(),
                             .sequence_length = 16,
                             .documents = documents,
                             .vocab_size = kVocab});
    UnigramModel model(kVocab);
    model.add(TokenFile(folder / "t"));
    EXPECT_EQ(model.total(), total);
    const UnigramScore score = score_unigram(model, set, set.choose_rows(std::nullopt));
    EXPECT_EQ(score.target_tokens, std::ssize(targets));
    EXPECT_NEAR(score.loss, sum / double(targets.size()), 1e-12);
    EXPECT_NEAR(unigram_loss(TokenFile(folder / "t"), set, kVocab), sum / double(targets.size()),
                1e-12);
  }
}

TEST(UnigramModel, ScoresExactlyTheChosenRows) {
  const TempFolder folder;
  write_pair(folder / "t", {{0, 0, 0, 1}});
  write_pair(folder / "v", {{0, 0, 0, 0, 0, 1, 1, 1, 1}});
  const ValidationSet set({.path = (folder / "v").string(), .sequence_length = 4});
  UnigramModel model(2);
  model.add(TokenFile(folder / "t"));
  const std::vector<int64_t> first = {0}, second = {1};
  EXPECT_NEAR(score_unigram(model, set, first).loss, -std::log(4.0 / 6), 1e-15);
  EXPECT_NEAR(score_unigram(model, set, second).loss, -std::log(2.0 / 6), 1e-15);
  EXPECT_EQ(score_unigram(model, set, second).target_tokens, 4);
}

TEST(UnigramModel, ProbabilitiesSumToOne_UnseenTokensIncluded) {
  const TempFolder folder;
  write_pair(folder / "t", {{0, 3, 3}});
  UnigramModel model(10);
  model.add(TokenFile(folder / "t"));
  double sum = 0;
  for (int64_t token = 0; token < 10; ++token) sum += std::exp(-model.nats(token));
  EXPECT_NEAR(sum, 1, 1e-12);
  UnigramModel small(3);
  EXPECT_THAT(message_of<DataError>([&] { small.add(TokenFile(folder / "t")); }),
              HasSubstr("token id 3"));
}

}  // namespace
}  // namespace capstan::data
