// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/tokenizer.h"

#include <gmock/gmock.h>

#include <random>
#include <thread>

#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "capstan/text/bpe_trainer.h"
#include "tiny_tokenizer.h"

namespace capstan::text {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

Tokenizer tiny() { return Tokenizer::parse(tiny_json().dump(), "tiny"); }

// A tokenizer trained on text of many kinds, with long merges.
Tokenizer trained(PiecePattern pattern) {
  bool given = false;
  const NextText next = [&given](std::string& part) {
    part.clear();
    for (int i = 0; i < 50; ++i)
      part += "int main() { return count + 1234; }\n\n  don't stop über straße ";
    return !std::exchange(given, true);
  };
  BpeTrainerOptions options;
  options.vocab_size = 400;
  options.pattern = pattern;
  return Tokenizer::parse(tokenizer_json(train_bpe(next, options)), "trained");
}

TEST(Tokenizer, Encode_MergesByRankLeftToRight) {
  const Tokenizer tokenizer = tiny();
  EXPECT_THAT(tokenizer.encode("hello"), ElementsAre(260));
  EXPECT_THAT(tokenizer.encode("hell"), ElementsAre(259));
  EXPECT_THAT(tokenizer.encode("lll"), ElementsAre(258, 'l' + 1));
  EXPECT_THAT(tokenizer.encode("ell"), ElementsAre('e' + 1, 258));
  EXPECT_THAT(tokenizer.encode("   x"), ElementsAre(261, ' ' + 1, 'x' + 1));
  EXPECT_THAT(tokenizer.encode(""), ElementsAre());
}

TEST(Tokenizer, Encode_LongPieceEqualsShortPieces) {
  const Tokenizer tokenizer = tiny();
  std::string text;
  std::vector<int32_t> expected;
  for (int i = 0; i < 5000; ++i) text += "hello", expected.push_back(260);
  EXPECT_EQ(tokenizer.encode(text), expected);
  EXPECT_EQ(tokenizer.encode(std::string(10001, 'l')).size(), 5001u);
}

TEST(Tokenizer, SpecialTokens_AreTextUnlessAsked) {
  const Tokenizer tokenizer = tiny();
  EXPECT_THAT(tokenizer.encode("l<|end|>l", {.parse_special = true}),
              ElementsAre('l' + 1, 0, 'l' + 1));
  const auto plain = tokenizer.encode("l<|end|>l");
  EXPECT_EQ(plain.size(), 9u);
  EXPECT_EQ(tokenizer.decode(plain), "l<|end|>l");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{0, 260, 0}, {.skip_special = true}), "hello");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{0, 260}), "<|end|>hello");
  EXPECT_TRUE(tokenizer.is_special(0));
  EXPECT_FALSE(tokenizer.is_special(260));
  EXPECT_FALSE(tokenizer.is_special(-1));
  EXPECT_THAT(tokenizer.special_ids(), ElementsAre(0));
}

TEST(Tokenizer, Lookups) {
  const Tokenizer tokenizer = tiny();
  EXPECT_EQ(tokenizer.vocab_size(), 262);
  EXPECT_EQ(tokenizer.id_of("ĠĠ"), 261);
  EXPECT_EQ(tokenizer.id_of("absent"), std::nullopt);
  EXPECT_EQ(tokenizer.token_bytes(261), "  ");
  EXPECT_EQ(tokenizer.fingerprint(), xxh3_128_hex(tiny_json().dump()));
  EXPECT_EQ(tokenizer.eos_id(), std::nullopt);  // <|end|> is no usual name
  EXPECT_THAT(tokenizer.summary(), HasSubstr("262 tokens"));
}

TEST(Tokenizer, Decode_RefusesIdsOutsideTheVocabulary) {
  const Tokenizer tokenizer = tiny();
  for (const int32_t id : {-1, 262, 1 << 30}) {
    const std::string text = message_of<DataError>([&] {
      (void)tokenizer.decode(std::vector<int32_t>{1, id});
    });
    EXPECT_THAT(text, HasSubstr("id " + std::to_string(id)));
    EXPECT_THAT(text, HasSubstr("[0, 261]"));
  }
}

TEST(Tokenizer, Config_NamesTheEnds) {
  const Tokenizer tokenizer = Tokenizer::parse(
      tiny_json().dump(), "tiny", R"({"eos_token": {"content": "<|end|>"}, "bos_token": "hello"})");
  EXPECT_EQ(tokenizer.eos_id(), 0);
  EXPECT_EQ(tokenizer.bos_id(), 260);
  const std::string text = message_of<DataError>(
      [] { (void)Tokenizer::parse(tiny_json().dump(), "tiny", R"({"eos_token": "</s>"})"); });
  EXPECT_THAT(text, HasSubstr("eos_token"));
  EXPECT_THAT(text, HasSubstr("'</s>'"));
}

TEST(Tokenizer, RoundTrip_AnyBytes) {
  for (const PiecePattern pattern :
       {PiecePattern::kGpt2, PiecePattern::kLlama3, PiecePattern::kQwen2}) {
    const Tokenizer tokenizer = trained(pattern);
    std::mt19937 random(7);
    for (int round = 0; round < 2000; ++round) {
      std::string text;
      const int length = static_cast<int>(random() % 60);
      for (int i = 0; i < length; ++i) {
        switch (random() % 5) {
          case 0:
            text += static_cast<char>(random());
            break;
          case 1:
            text += "int main über "[random() % 14];
            break;
          case 2:
            text += "\xe4\xbd\xa0";
            break;
          case 3:
            text += " \n\t\r"[random() % 4];
            break;
          default:
            text += static_cast<char>('a' + random() % 26);
        }
      }
      const EncodeOptions options{.parse_special = round % 2 == 0};
      ASSERT_EQ(tokenizer.decode(tokenizer.encode(text, options)), text);
    }
  }
}

TEST(Tokenizer, RoundTrip_EveryByteAlone) {
  const Tokenizer tokenizer = tiny();
  for (int b = 0; b < 256; ++b) {
    const std::string text(1, static_cast<char>(b));
    EXPECT_THAT(tokenizer.encode(text), ElementsAre(b + 1));
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
}

TEST(Tokenizer, InvalidUtf8_IsOnePiecePerByteAndDoesNotDisturbItsNeighbours) {
  const Tokenizer tokenizer = tiny();
  EXPECT_THAT(tokenizer.encode("hello\xff\xfehello"), ElementsAre(260, 0x100, 0xff, 260));
  // Overlong, surrogate, beyond U+10FFFF, cut short.
  for (const char* text : {"\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82"}) {
    EXPECT_EQ(tokenizer.encode(text).size(), std::string_view(text).size());
  }
}

TEST(Tokenizer, ManyThreads_GiveTheSameIds) {
  const Tokenizer first = trained(PiecePattern::kLlama3), second = tiny(),
                  third = trained(PiecePattern::kGpt2);
  std::string text;
  for (int i = 0; i < 300; ++i) text += "return hello" + std::to_string(i * 7919) + " straße;\n";
  const auto a = first.encode(text), b = second.encode(text), c = third.encode(text);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < 10;
           ++round) {  // three tokenizers in turn: the caches are replaced
        wrong += first.encode(text) != a;
        wrong += second.encode(text) != b;
        wrong += third.encode(text) != c;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(Tokenizer, MissingByte_IsRefusedWhenMetOrUnknown) {
  json::Json file = tiny_json();
  json::Json& vocab = file["model"]["vocab"];
  vocab.erase("z");
  vocab["ĠĠ"] = 'z' + 1;  // keeps the ids without a gap
  const Tokenizer strict = Tokenizer::parse(file.dump(), "tiny");
  EXPECT_THAT(strict.encode("hello"), ElementsAre(260));
  const std::string text = message_of<DataError>([&] { (void)strict.encode("zz"); });
  EXPECT_THAT(text, HasSubstr("byte 0x7a"));
  file["model"]["unk_token"] = "<|end|>";
  EXPECT_THAT(Tokenizer::parse(file.dump(), "tiny").encode("zzl"), ElementsAre(0, 0, 'l' + 1));
  file["model"]["fuse_unk"] = true;
  EXPECT_THAT(Tokenizer::parse(file.dump(), "tiny").encode("zzl"), ElementsAre(0, 'l' + 1));
}

TEST(Tokenizer, Merges_AsPairsOfStrings) {
  json::Json file = tiny_json();
  json::Json pairs = json::Json::array();
  for (const json::Json& merge : file["model"]["merges"]) {
    const auto text = merge.get<std::string>();
    const size_t space = text.find(' ');
    pairs.push_back({text.substr(0, space), text.substr(space + 1)});
  }
  file["model"]["merges"] = pairs;
  EXPECT_THAT(Tokenizer::parse(file.dump(), "tiny").encode("hello  x"),
              ElementsAre(260, ' ' + 1, ' ' + 1, 'x' + 1));
}

TEST(Tokenizer, Load_FolderFileAndMissing) {
  const TemporaryFolder folder;
  const std::string missing =
      message_of<ConfigError>([&] { (void)Tokenizer::load(folder.path()); });
  EXPECT_THAT(missing, HasSubstr("without tokenizer.json"));
  EXPECT_THAT(message_of<ConfigError>([&] { (void)Tokenizer::load(folder.path() / "none"); }),
              HasSubstr("no such file"));
  const auto file = folder.write("tokenizer.json", tiny_json().dump());
  folder.write("tokenizer_config.json", R"({"eos_token": "<|end|>"})");
  EXPECT_EQ(Tokenizer::load(folder.path()).eos_id(), 0);
  EXPECT_EQ(Tokenizer::load(file).eos_id(), 0);
}

}  // namespace
}  // namespace capstan::text
