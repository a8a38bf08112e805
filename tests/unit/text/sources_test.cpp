// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/sources.h"

#include <gmock/gmock.h>

#include "capstan/base/error.h"
#include "tiny_tokenizer.h"

namespace capstan::text {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> names(const SourceOptions& options, SourceCounts* counts = nullptr) {
  std::vector<std::string> relative;
  for (const Source& source : list_sources(options, counts)) {
    EXPECT_TRUE(source.path.is_absolute());
    EXPECT_EQ(static_cast<uintmax_t>(source.size), std::filesystem::file_size(source.path));
    relative.push_back(source.relative);
  }
  return relative;
}

SourceOptions of(const TemporaryFolder& folder) {
  SourceOptions options;
  options.inputs = {folder.path()};
  return options;
}

TEST(Sources, WalksSortedAndLeavesOutWhatIsNoText) {
  const TemporaryFolder folder;
  folder.write("b.txt", "b");
  folder.write("a/z.txt", "az");
  folder.write("a.txt", "a");
  folder.write("binary.dat", std::string("a\0b", 3));
  folder.write("latin1.txt", "caf\xe9 au lait");
  folder.write("empty.txt", "");
  folder.write(".hidden/x.txt", "x");
  folder.write(".hidden.txt", "x");
  SourceCounts counts;
  EXPECT_THAT(names(of(folder), &counts), ElementsAre("a.txt", "a/z.txt", "b.txt"));
  EXPECT_EQ(counts.binary, 1);
  EXPECT_EQ(counts.not_utf8, 1);
  EXPECT_EQ(counts.empty, 1);
  EXPECT_EQ(counts.kept_bytes, 4);
  EXPECT_EQ(counts.summary(), "left out: 1 binary, 1 not UTF-8, 1 empty");
}

TEST(Sources, PatternsSizeAndDuplicates) {
  const TemporaryFolder folder;
  for (const char* name : {"x.h", "ATen/y.h", "ATen/ops/add.h", "ATen/ops/cpu/deep.h", "google/z.h",
                           "c/google/w.h", "notes.md"}) {
    folder.write(name, std::string("content of ") + name);
  }
  folder.write("big.h", std::string(5000, 'x'));
  folder.write("copy.h", "content of x.h");
  SourceOptions options = of(folder);
  options.include = {"*.h"};
  options.exclude = {"ATen/ops", "google/"};
  options.max_file_bytes = 4096;
  options.deduplicate = true;
  SourceCounts counts;
  EXPECT_THAT(names(options, &counts), ElementsAre("ATen/y.h", "copy.h"));
  EXPECT_EQ(counts.duplicates, 1);
  EXPECT_EQ(counts.too_large, 1);
  options.deduplicate = false;
  options.exclude = {"**/deep.h", "*.md"};
  options.include = {};
  EXPECT_THAT(names(options), ElementsAre("ATen/ops/add.h", "ATen/y.h", "c/google/w.h", "copy.h",
                                          "google/z.h", "x.h"));
  options.include = {"ATen"};
  EXPECT_THAT(names(options), ElementsAre("ATen/ops/add.h", "ATen/y.h"));
}

TEST(Sources, LinksLoopsAndRepeatedInputs) {
  const TemporaryFolder folder;
  const Path file = folder.write("a/x.txt", "x");
  std::filesystem::create_directory_symlink(folder.path(), folder.path() / "a/loop");
  std::filesystem::create_directory_symlink("..", folder.path() / "a/up");
  std::filesystem::create_symlink("nowhere", folder.path() / "broken.txt");
  SourceCounts counts;
  EXPECT_THAT(names(of(folder), &counts), ElementsAre("a/x.txt"));
  EXPECT_EQ(counts.broken_links, 1);
  SourceOptions twice;
  twice.inputs = {file, folder.path() / "a"};
  EXPECT_THAT(names(twice), ElementsAre("x.txt"));
}

TEST(Sources, ClearErrors) {
  const TemporaryFolder folder;
  const auto refusal = [](const SourceOptions& options) {
    return message_of<ConfigError>([&] { (void)list_sources(options); });
  };
  SourceOptions options;
  EXPECT_THAT(refusal(options), HasSubstr("no input"));
  options.inputs = {folder.path() / "none"};
  EXPECT_THAT(refusal(options), HasSubstr("no such file or folder"));
  EXPECT_THAT(refusal(of(folder)), HasSubstr("a folder without text"));
  folder.write("only.bin", std::string(4, '\0'));
  EXPECT_THAT(refusal(of(folder)), HasSubstr("a folder without text"));
  folder.write("a.txt", "a");
  options = of(folder);
  options.include = {"*.md"};
  EXPECT_THAT(refusal(options), HasSubstr("by pattern"));
  options.inputs = {folder.path() / "only.bin"};
  options.include = {};
  EXPECT_THAT(message_of<DataError>([&] { (void)list_sources(options); }), HasSubstr("NUL"));
  options.inputs = {folder.write("empty.txt", "")};
  EXPECT_THAT(message_of<DataError>([&] { (void)list_sources(options); }),
              HasSubstr("an empty file"));
}

TEST(Sources, DigestSeesNamesAndContents) {
  const TemporaryFolder folder;
  folder.write("a.txt", "one");
  folder.write("b.txt", "two");
  const auto digest = [&] { return content_digest(list_sources(of(folder))); };
  const std::string before = digest();
  EXPECT_EQ(digest(), before);
  folder.write("b.txt", "twO");
  EXPECT_NE(digest(), before);
  folder.write("b.txt", "two");
  EXPECT_EQ(digest(), before);
  std::filesystem::rename(folder.path() / "b.txt", folder.path() / "c.txt");
  EXPECT_NE(digest(), before);
}

TEST(Sources, ByteSizes) {
  EXPECT_EQ(parse_byte_size("4096", "--x"), 4096);
  EXPECT_EQ(parse_byte_size("512KiB", "--x"), 512 * 1024);
  EXPECT_EQ(parse_byte_size("1.5 MiB", "--x"), 3 << 19);
  EXPECT_EQ(parse_byte_size("2GB", "--x"), 2000000000);
  for (const char* text :
       {"", "KiB", "-1", "1e3", "12 parsecs", "1.2.3", "99999999999TiB", "0x10"}) {
    EXPECT_THAT(message_of<ConfigError>([&] { (void)parse_byte_size(text, "--x"); }),
                HasSubstr("--x"));
  }
}

}  // namespace
}  // namespace capstan::text
