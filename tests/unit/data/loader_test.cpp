// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/loader.h"

#include <gmock/gmock.h>

#include <thread>

#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::Each;
using ::testing::HasSubstr;

class LoaderTest : public ::testing::Test {
 protected:
  LoaderTest() {
    write_ramp(folder_ / "a", 101);
    std::vector<Document> documents;
    for (int32_t d = 0; d < 12; ++d)
      documents.push_back(Document(static_cast<size_t>(d + 1), 1000 + d));
    write_pair(folder_ / "b", documents);
  }
  [[nodiscard]] DataOptions options() const {
    return {.train = {{(folder_ / "a").string(), 3.0}, {(folder_ / "b").string(), 1.0}},
            .sequence_length = 8,
            .seed = 5};
  }
  static void expect_equal(const SampleBatch& whole, int64_t from, const SampleBatch& part) {
    for (int64_t i = 0; i < part.samples; ++i) {
      EXPECT_EQ(whole.global_sample[size_t(from + i)], part.global_sample[size_t(i)]);
      for (int64_t t = 0; t < part.length; ++t) {
        const auto a = static_cast<size_t>((from + i) * part.length + t),
                   b = static_cast<size_t>(i * part.length + t);
        ASSERT_EQ(whole.tokens[a], part.tokens[b]);
        ASSERT_EQ(whole.targets[a], part.targets[b]);
        ASSERT_EQ(whole.positions[a], part.positions[b]);
        ASSERT_EQ(whole.document_ids[a], part.document_ids[b]);
      }
    }
  }
  TempFolder folder_;
};

TEST_F(LoaderTest, AnyRankCountReadsTheSameSamples) {
  const TrainLoader loader(options());
  constexpr int64_t kStep = 12;
  for (const int64_t step : {0, 3}) {
    const SampleBatch whole = loader.read(step * kStep, kStep);
    for (const int64_t ranks : {1, 2, 3, 4, 12}) {
      const TrainLoader own(options());  // each rank opens the files itself
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const SampleRange range = share_of({step * kStep, kStep}, rank, ranks);
        expect_equal(whole, range.first - step * kStep, own.read(range.first, range.count));
      }
    }
  }
}

TEST_F(LoaderTest, ResumeAnywhere_IsTheSameStream) {
  const TrainLoader loader(options());
  const SampleBatch whole = loader.read(0, 300);
  for (const int64_t first : {1, 17, 100, 299}) {
    const TrainLoader fresh(options());
    expect_equal(whole, first, fresh.read(first, 300 - first));
  }
}

TEST_F(LoaderTest, SamplesAreTheRowsThatTheOrderNames) {
  const TrainLoader loader(options());
  EXPECT_EQ(loader.sources(), 2);
  EXPECT_EQ(loader.rows(), 12 + 9);
  EXPECT_EQ(loader.tokens(), 101 + 78);
  SampleBatch batch = loader.read(0, 64);
  SampleBatch row = make_batch(1, 8);
  for (int64_t i = 0; i < 64; ++i) {
    const SampleOrder::Place place = loader.place_of(i);
    loader.source(place.source).read(place.row, row.row(0));
    EXPECT_EQ(batch.epoch[size_t(i)], place.epoch);
    EXPECT_TRUE(std::equal(row.tokens.begin(), row.tokens.end(), batch.row(i).tokens.begin()));
  }
}

TEST_F(LoaderTest, PaddingRowsWeighNothing) {
  const TrainLoader loader(options());
  const SampleBatch batch = loader.read_padded({5, 3}, 4);
  EXPECT_EQ(batch.samples, 4);
  EXPECT_EQ(batch.target_tokens(), 3 * 8);
  EXPECT_THAT(batch.valid, ::testing::ElementsAre(1, 1, 1, 0));
  EXPECT_EQ(batch.global_sample[3], -1);
  expect_equal(batch, 0, loader.read(5, 3));
}

TEST_F(LoaderTest, ReadIsThreadSafe) {
  const TrainLoader loader(options());
  const SampleBatch whole = loader.read(0, 200);
  std::vector<SampleBatch> parts(4);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] { parts[size_t(t)] = loader.read(t * 50, 50); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int t = 0; t < 4; ++t) expect_equal(whole, t * 50, parts[size_t(t)]);
}

TEST_F(LoaderTest, IdsOutsideTheVocabulary_AreRefused) {
  DataOptions bad = options();
  bad.train = {{(folder_ / "a").string(), 1.0}};
  bad.vocab_size = 101;
  EXPECT_NO_THROW((void)TrainLoader(bad).read(0, 12));
  bad.vocab_size = 50;
  const std::string text = message_of<DataError>([&] { (void)TrainLoader(bad).read(0, 12); });
  EXPECT_THAT(text, HasSubstr("a.bin"));
  EXPECT_THAT(text, HasSubstr("0 to 49"));
}

TEST_F(LoaderTest, ChangedFile_StopsTheRead) {
  const TrainLoader loader(options());
  (void)loader.read(0, 8);
  fs::remove(folder_ / "a.bin");
  EXPECT_THAT(message_of<DataError>([&] { (void)loader.read(8, 8); }),
              HasSubstr("no file any more"));
}

TEST_F(LoaderTest, OtherTokenizer_IsRefused) {
  spill(folder_ / "in" / "x.txt", std::string(500, 'x'));
  PrepareOptions prepare;
  prepare.inputs = {(folder_ / "in").string()};
  prepare.output = (folder_ / "c").string();
  (void)prepare_with(prepare, byte_encoder());
  DataOptions c{
      .train = {{prepare.output, 1.0}}, .sequence_length = 8, .tokenizer_fingerprint = "bytes"};
  EXPECT_NO_THROW(TrainLoader{c});
  c.tokenizer_fingerprint = "another";
  EXPECT_THAT(message_of<ConfigError>([&] { TrainLoader{c}; }),
              HasSubstr("tokens of tokenizer bytes"));
}

TEST_F(LoaderTest, NoSource_IsRefused) {
  EXPECT_THAT(message_of<ConfigError>([] { TrainLoader(DataOptions{.sequence_length = 8}); }),
              HasSubstr("data.train"));
}

TEST_F(LoaderTest, Fingerprint_FollowsWhatDecidesTheSamples) {
  const auto hex = [](const DataOptions& o) { return TrainLoader(o).fingerprint().hex(); };
  const std::string base = hex(options());
  EXPECT_EQ(base, hex(options()));
  DataOptions other = options();
  other.sequence_length = 4;
  EXPECT_NE(base, hex(other));
  other = options();
  other.shuffle = false;
  EXPECT_NE(base, hex(other));
  other = options();
  other.documents = Documents::kSeparate;
  EXPECT_NE(base, hex(other));
  other = options();
  std::swap(other.train[0], other.train[1]);
  EXPECT_NE(base, hex(other));
  other = options();
  other.train[1].weight = 2;
  EXPECT_NE(base, hex(other));
  // Another name for the same content is the same data.
  for (const char* ending : {".bin", ".idx"}) {
    fs::copy_file(folder_ / (std::string("a") + ending), folder_ / (std::string("copy") + ending));
  }
  other = options();
  other.train[0].path = (folder_ / "copy").string();
  EXPECT_EQ(base, hex(other));
}

TEST_F(LoaderTest, OptionsFromARecipe) {
  recipe::Recipe recipe;
  recipe.run.seed = 77;
  recipe.batch.sequence_length = 8;
  recipe.data.train = {{(folder_ / "a").string(), 2.0}};
  recipe.data.shuffle = false;
  recipe.data.documents = "separate";
  recipe.model.vocab_size = 300;
  const DataOptions made = make_data_options(recipe, "f");
  EXPECT_EQ(made.seed, 77u);
  EXPECT_EQ(made.train[0].weight, 2.0);
  EXPECT_EQ(made.vocab_size, 300);
  EXPECT_FALSE(made.shuffle);
  EXPECT_EQ(made.documents, Documents::kSeparate);
  EXPECT_EQ(made.tokenizer_fingerprint, "f");
}

}  // namespace
}  // namespace capstan::data
