// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ids and merges against those recorded from the `tokenizers` package (make_fixtures.py).
#include <gtest/gtest.h>
#include <zlib.h>

#include <cstdio>

#include "capstan/base/json.h"
#include "capstan/base/text.h"
#include "capstan/text/bpe_trainer.h"
#include "capstan/text/documents.h"
#include "capstan/text/tokenizer.h"

namespace capstan::text {
namespace {

const json::Json& fixture() {
  static const json::Json value = [] {
    const Path path = Path(CAPSTAN_SOURCE_DIR) / "tests/fixtures/text/peer.json.gz";
    ByteStream stream(path, 1000);
    std::string text, block(1 << 16, '\0');
    while (const size_t count = stream.read(block.data(), block.size()))
      text.append(block, 0, count);
    return json::parse(text, path.string());
  }();
  return value;
}

const json::Json& recorded(const std::string& name) {
  for (const json::Json& entry : fixture()["tokenizers"]) {
    if (entry["name"] == name) return entry;
  }
  throw std::runtime_error("no fixture " + name);
}

std::string check_of(const std::vector<int32_t>& ids) {
  const uLong crc = crc32(0, reinterpret_cast<const Bytef*>(ids.data()),
                          static_cast<uInt>(ids.size() * sizeof(int32_t)));
  char text[8];
  std::snprintf(text, sizeof text, "%04lx", crc & 0xffff);
  return text;
}

class Peer : public testing::TestWithParam<const char*> {};

TEST_P(Peer, EncodesFiveThousandStringsEqually) {
  const json::Json& entry = recorded(GetParam());
  const Tokenizer tokenizer = Tokenizer::parse(entry["json"].get<std::string>(), GetParam());
  const EncodeOptions options{.add_special = entry["options"].value("add_special", false),
                              .parse_special = entry["options"].value("parse_special", true)};
  const auto crcs = entry["crc"].get<std::string>();
  const json::Json& strings = fixture()["strings"];
  ASSERT_EQ(strings.size(), 5000u);
  ASSERT_EQ(crcs.size(), 4 * strings.size());
  int wrong = 0;
  for (size_t i = 0; i < strings.size(); ++i) {
    const auto& text = strings[i].get_ref<const std::string&>();
    const std::vector<int32_t> ids = tokenizer.encode(text, options);
    if (check_of(ids) == crcs.substr(4 * i, 4)) continue;
    if (++wrong > 5) continue;
    std::string pieces;
    for (const int32_t id : ids)
      pieces += std::to_string(id) + quote(tokenizer.token_bytes(id)) + " ";
    ADD_FAILURE() << "string " << i << ": " << quote(text, 400) << "\nours: " << pieces;
  }
  EXPECT_EQ(wrong, 0);
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, Peer,
                         testing::Values("llama3", "gpt2", "gpt2_prefix_space", "added_tokens",
                                         "special_as_text", "ignore_merges", "qwen2_nfc",
                                         "nfkd_then_nfc", "o200k", "digits", "three_splits"),
                         [](const auto& test) { return std::string(test.param); });

class PeerTraining : public testing::TestWithParam<std::pair<const char*, PiecePattern>> {};

// The package counts and merges the same strings; its tie rule is ours, so everything must agree.
TEST_P(PeerTraining, LearnsTheSameVocabularyAndMerges) {
  const auto& [name, pattern] = GetParam();
  const json::Json theirs = json::parse(recorded(name)["json"].get<std::string>(), name);
  const json::Json& strings = fixture()["strings"];
  size_t at = 0;
  const NextText next = [&](std::string& part) {
    if (at == strings.size()) return false;
    part = strings[at++].get<std::string>();
    return true;
  };
  BpeTrainerOptions options;
  options.vocab_size = 600;
  options.pattern = pattern;
  if (pattern == PiecePattern::kGpt2) options.special_tokens = {"<|endoftext|>", "<|begin|>"};
  const json::Json ours = json::parse(tokenizer_json(train_bpe(next, options)), "ours");
  EXPECT_EQ(ours["model"]["vocab"], theirs["model"]["vocab"]);
  std::vector<std::string> merges;
  for (const json::Json& merge : theirs["model"]["merges"]) {
    merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  EXPECT_EQ(ours["model"]["merges"].get<std::vector<std::string>>(), merges);
  EXPECT_EQ(ours["pre_tokenizer"], theirs["pre_tokenizer"]);
}

INSTANTIATE_TEST_SUITE_P(Patterns, PeerTraining,
                         testing::Values(std::pair("llama3", PiecePattern::kLlama3),
                                         std::pair("gpt2", PiecePattern::kGpt2)),
                         [](const auto& test) { return std::string(test.param.first); });

}  // namespace
}  // namespace capstan::text
