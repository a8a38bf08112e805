// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/tokenizer_folder.h"

#include <gmock/gmock.h>

#include "capstan/base/error.h"
#include "tiny_tokenizer.h"

namespace capstan::text {
namespace {

using testing::HasSubstr;

TrainFolderOptions options_for(const TemporaryFolder& folder) {
  TrainFolderOptions options;
  options.sources.inputs = {folder.path() / "corpus"};
  options.output = folder.path() / "out/tokenizer";
  options.trainer.vocab_size = 280;
  return options;
}

TEST(TokenizerFolder, Train_ThenUpToDate_ThenRefused) {
  const TemporaryFolder folder;
  folder.write("corpus/a.txt", "the cat and the other cat and the hat");
  TrainFolderOptions options = options_for(folder);
  const FolderReport first = train_tokenizer_folder(options);
  EXPECT_FALSE(first.up_to_date);
  EXPECT_EQ(Tokenizer::load(options.output).fingerprint(), first.tokenizer.fingerprint());
  EXPECT_EQ(Tokenizer::load(options.output).eos_id(), 0);

  options.trainer.threads = 3;  // not part of what identifies the result
  EXPECT_TRUE(train_tokenizer_folder(options).up_to_date);

  folder.write("corpus/b.txt", "quite different words, different words");
  EXPECT_THAT(message_of<ConfigError>([&] { (void)train_tokenizer_folder(options); }),
              HasSubstr("another corpus or with other options"));
  options.force = true;
  const FolderReport second = train_tokenizer_folder(options);
  EXPECT_NE(second.tokenizer.fingerprint(), first.tokenizer.fingerprint());
  options.force = false;
  EXPECT_TRUE(train_tokenizer_folder(options).up_to_date);
}

TEST(TokenizerFolder, Train_RecoversAfterAStopBetweenFiles) {
  const TemporaryFolder folder;
  folder.write("corpus/a.txt", "the cat and the other cat");
  const TrainFolderOptions options = options_for(folder);
  const FolderReport first = train_tokenizer_folder(options);
  std::filesystem::remove(options.output / "tokenizer_training.json");
  EXPECT_TRUE(train_tokenizer_folder(options).up_to_date);  // trained again, found equal
  EXPECT_TRUE(std::filesystem::exists(options.output / "tokenizer_training.json"));
  std::filesystem::remove(options.output / "tokenizer.json");
  const FolderReport again = train_tokenizer_folder(options);
  EXPECT_EQ(again.tokenizer.fingerprint(), first.tokenizer.fingerprint());
  // A file changed by hand is noticed, not taken for the result.
  folder.write("out/tokenizer/tokenizer.json", tiny_json().dump());
  EXPECT_THAT(message_of<ConfigError>([&] { (void)train_tokenizer_folder(options); }),
              HasSubstr("--force"));
}

TEST(TokenizerFolder, Import) {
  const TemporaryFolder folder;
  const Path file = folder.write("in/tokenizer.json", tiny_json().dump(2));
  folder.write("in/tokenizer_config.json", R"({"eos_token": "<|end|>"})");
  const Path output = folder.path() / "out";
  EXPECT_FALSE(import_tokenizer_folder(file, output, false).up_to_date);
  EXPECT_TRUE(import_tokenizer_folder(file.parent_path(), output, false).up_to_date);
  EXPECT_EQ(Tokenizer::load(output).eos_id(), 0);
  EXPECT_EQ(read_file(output / "tokenizer.json"), tiny_json().dump(2));

  folder.write("in/tokenizer_config.json", R"({"eos_token": "hello"})");
  EXPECT_THAT(message_of<ConfigError>([&] { (void)import_tokenizer_folder(file, output, false); }),
              HasSubstr("tokenizer_config.json"));
  EXPECT_FALSE(import_tokenizer_folder(file, output, true).up_to_date);
  EXPECT_EQ(Tokenizer::load(output).eos_id(), 260);

  folder.write("in/tokenizer.json", "{}");
  EXPECT_THROW((void)import_tokenizer_folder(file, output, true), DataError);
  EXPECT_EQ(Tokenizer::load(output).eos_id(), 260);  // untouched
}

}  // namespace
}  // namespace capstan::text
