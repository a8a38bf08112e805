// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/bpe_trainer.h"

#include <gmock/gmock.h>

#include <atomic>
#include <random>

#include "capstan/base/error.h"
#include "capstan/text/tokenizer.h"
#include "text/scanner.h"
#include "text/word_counter.h"
#include "tiny_tokenizer.h"

namespace capstan::text {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

NextText parts(std::vector<std::string> texts) {
  auto shared = std::make_shared<std::vector<std::string>>(std::move(texts));
  auto at = std::make_shared<size_t>(0);
  return [shared, at](std::string& part) {
    if (*at == shared->size()) return false;
    part = (*shared)[(*at)++];
    return true;
  };
}

std::string many_words(unsigned seed, int words) {
  std::mt19937 random(seed);
  std::string text;
  for (int i = 0; i < words; ++i) {
    const unsigned kind = random() % 500;
    text += "w" + std::to_string(kind * kind % 977) + (kind % 7 == 0 ? "\n" : " ");
    text += std::string(1 + kind % 3, static_cast<char>('a' + kind % 26)) + "über";
    if (kind % 11 == 0) text += "\n";
  }
  return text;
}

std::vector<std::string> learned(const BpeTrainerResult& result) {
  return {result.token_bytes.begin() + static_cast<long>(result.special_tokens.size()) + 256,
          result.token_bytes.end()};
}

TEST(BpeTrainer, TakesTheMostFrequentPair_ThenTheSmallerIds) {
  BpeTrainerOptions options;
  options.vocab_size = 1000;
  // ab 4 times; cd and " ab" 3 times each, and 'c' has a smaller id than the space; pq and xy tie
  // at 2.
  const auto result = train_bpe(parts({"ab ab ab ab", "cd cd cd", "xy xy pq pq"}), options);
  const auto tokens = learned(result);
  ASSERT_GE(tokens.size(), 3u);
  EXPECT_EQ(tokens[0], "ab");
  EXPECT_EQ(tokens[1], "cd");
  EXPECT_EQ(tokens[2], " ab");
  const auto place = [&](const char* token) {
    return std::find(tokens.begin(), tokens.end(), token) - tokens.begin();
  };
  EXPECT_LT(place("pq"), place("xy"));
  EXPECT_LT(static_cast<int64_t>(result.token_bytes.size()), 1000);  // the text has no more pairs
}

TEST(BpeTrainer, Alphabet_SpecialTokensThenAllBytes) {
  BpeTrainerOptions options;
  options.vocab_size = 258;
  options.special_tokens = {"<|endoftext|>", "<|pad|>"};
  const auto result = train_bpe(parts({"aaaa"}), options);
  EXPECT_EQ(result.token_bytes.size(), 258u);
  EXPECT_TRUE(result.merges.empty());
  EXPECT_EQ(result.token_bytes[2], "!");
  const Tokenizer tokenizer =
      Tokenizer::parse(tokenizer_json(result), "t", tokenizer_config_json(result));
  EXPECT_EQ(tokenizer.eos_id(), 0);
  EXPECT_EQ(tokenizer.bos_id(), 0);
  EXPECT_EQ(tokenizer.vocab_size(), 258);
  for (int b = 0; b < 256; ++b) {
    EXPECT_EQ(tokenizer.encode(std::string(1, static_cast<char>(b))).size(), 1u);
  }
}

TEST(BpeTrainer, OverlappingPairsAreMergedFromTheLeft) {
  BpeTrainerOptions options;
  options.vocab_size = 260;
  const auto result = train_bpe(parts({"aaaaa", "aaaaa", "aaaaa"}), options);
  // aa+aa+a: (aa, a) and (aa, aa) tie, and a has the smaller id.
  EXPECT_THAT(learned(result), ElementsAre("aa", "aaa", "aaaaa"));
}

TEST(BpeTrainer, ResultDoesNotDependOnThreadsOrderOrParts) {
  std::vector<std::string> texts;
  for (unsigned seed = 0; seed < 6; ++seed)
    texts.push_back(many_words(seed, 40000));  // > 1 MiB together
  BpeTrainerOptions options;
  options.vocab_size = 700;
  options.threads = 1;
  const auto one = train_bpe(parts(texts), options);
  for (const int threads : {2, 3, 8}) {
    options.threads = threads;
    std::reverse(texts.begin(), texts.end());
    const auto many = train_bpe(parts(texts), options);
    EXPECT_EQ(tokenizer_json(many), tokenizer_json(one));
    EXPECT_EQ(many.corpus_pieces, one.corpus_pieces);
    EXPECT_EQ(many.distinct_pieces, one.distinct_pieces);
  }
  EXPECT_EQ(one.token_bytes.size(), 700u);
}

TEST(BpeTrainer, FilesAreCutWithoutChangingPieces) {
  const TemporaryFolder folder;
  const std::string text = many_words(9, 200000);  // several blocks of the file reader
  ASSERT_GT(text.size(), 2u << 20);
  const Path file = folder.write("a.txt", text);
  for (const PiecePattern pattern :
       {PiecePattern::kGpt2, PiecePattern::kLlama3, PiecePattern::kQwen2}) {
    BpeTrainerOptions options;
    options.vocab_size = 400;
    options.pattern = pattern;
    const std::vector<Source> sources = {{file, "a.txt", static_cast<int64_t>(text.size())}};
    const auto from_file = train_bpe(sources, {}, options);
    const CorpusCounts counts = count_words(parts({text}), options);
    // The same pieces as scanning the whole text at once.
    int64_t pieces = 0;
    for (std::string_view rest = text; !rest.empty(); ++pieces) {
      rest.remove_prefix(scanner_of(pattern)(rest));
    }
    EXPECT_EQ(counts.pieces, pieces);
    EXPECT_EQ(from_file.corpus_pieces, counts.pieces);
    EXPECT_EQ(from_file.distinct_pieces, static_cast<int64_t>(counts.words.words().size()));
  }
}

TEST(BpeTrainer, Cuts_AreWherePiecesEndAnyway) {
  EXPECT_EQ(next_cut("ab\ncd", 1), 3u);
  EXPECT_EQ(next_cut("ab\n\ncd", 1),
            std::string_view::npos);  // GPT-2 joins newlines before text's end
  EXPECT_EQ(next_cut("ab\n cd\nx", 1), 7u);
  EXPECT_EQ(next_cut("ab\n\xc3\xa9", 1), std::string_view::npos);
  EXPECT_EQ(next_cut("ab\n", 1), std::string_view::npos);
  EXPECT_EQ(next_cut("\nab", 0), std::string_view::npos);
  EXPECT_EQ(next_cut("", 0), std::string_view::npos);
}

TEST(BpeTrainer, EndlessLineTakesNoEndlessTime) {
  BpeTrainerOptions options;
  options.vocab_size = 300;
  const auto result = train_bpe(parts({std::string(3 << 20, 'x')}), options);
  EXPECT_EQ(result.corpus_bytes, 3 << 20);
  EXPECT_LE(result.distinct_pieces, 2);
}

TEST(BpeTrainer, InvalidUtf8_IsNotMerged) {
  BpeTrainerOptions options;
  options.vocab_size = 400;
  const auto result =
      train_bpe(parts({"\xff\xfe\xff\xfe", "\xff\xfe\xff\xfe\xe4\xbd\xa0\xe4\xbd\xa0"}), options);
  for (const std::string& token : learned(result)) EXPECT_EQ(token.find('\xff'), std::string::npos);
  EXPECT_THAT(learned(result), testing::Contains("\xe4\xbd\xa0"));
}

TEST(BpeTrainer, SpecialTokenIsNeverBuiltByMerges) {
  BpeTrainerOptions options;
  options.vocab_size = 300;
  options.special_tokens = {"abcd"};
  const auto result = train_bpe(parts({"abcd abcd abcd abcd abcd"}), options);
  const Tokenizer tokenizer = Tokenizer::parse(tokenizer_json(result), "t");
  EXPECT_GT(tokenizer.encode("abcd").size(), 1u);
  EXPECT_THAT(tokenizer.encode("abcd", {.parse_special = true}), ElementsAre(0));
}

TEST(BpeTrainer, Refusals) {
  const auto refusal = [](auto change) {
    BpeTrainerOptions options;
    change(options);
    return message_of<ConfigError>([&] { (void)train_bpe(parts({"abc"}), options); });
  };
  EXPECT_THAT(refusal([](auto& o) { o.vocab_size = 256; }), HasSubstr("257"));
  EXPECT_THAT(refusal([](auto& o) { o.vocab_size = int64_t{1} << 40; }), HasSubstr("vocab size"));
  EXPECT_THAT(refusal([](auto& o) { o.special_tokens = {"<a>", "<a>"}; }), HasSubstr("twice"));
  EXPECT_THAT(refusal([](auto& o) { o.special_tokens = {"a"}; }),
              HasSubstr("more than one character"));
  EXPECT_THAT(refusal([](auto& o) { o.special_tokens = {""}; }), HasSubstr("special token"));
  EXPECT_THAT(refusal([](auto& o) { o.min_count = 0; }), HasSubstr("min count"));
  EXPECT_THAT(refusal([](auto& o) { o.threads = -1; }), HasSubstr("threads"));
  EXPECT_THAT(refusal([](auto& o) { o.max_word_bytes = 10; }), HasSubstr("distinct pieces"));
  EXPECT_THAT(message_of<ConfigError>([] { (void)piece_pattern_from_name("bert"); }),
              HasSubstr("'bert'"));
}

TEST(BpeTrainer, FailureOfTheInputReachesTheCaller) {
  std::atomic<int> calls{0};
  const NextText next = [&](std::string& part) -> bool {
    if (++calls > 3) throw DataError(std::string("line 4 is broken"));
    part = "some text";
    return true;
  };
  BpeTrainerOptions options;
  options.threads = 4;
  EXPECT_THAT(message_of<DataError>([&] { (void)train_bpe(next, options); }), HasSubstr("line 4"));
}

}  // namespace
}  // namespace capstan::text
