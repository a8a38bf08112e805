// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/token_file.h"

#include <gmock/gmock.h>
#include <sys/wait.h>

#include <csignal>

#include "capstan/data/inspect.h"
#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<int64_t> read_all(const TokenFile& file) {
  std::vector<int64_t> ids(static_cast<size_t>(file.tokens()));
  file.read(0, ids);
  return ids;
}

TEST(TokenFile, RoundTrip_BothTypes) {
  for (const TokenType type : {TokenType::kUint16, TokenType::kInt32}) {
    const TempFolder folder;
    const int32_t big = type == TokenType::kUint16 ? 65535 : 2000000000;
    const PairSummary summary = write_pair(folder / "a", {{1, 2, big}, {}, {4}, {5, 6}}, type);
    const TokenFile file(folder / "a");
    EXPECT_EQ(file.type(), type);
    EXPECT_EQ(file.documents(), 4);
    EXPECT_EQ(file.tokens(), 6);
    EXPECT_THAT(read_all(file), ElementsAre(1, 2, big, 4, 5, 6));
    EXPECT_EQ(file.document(2).first, 3);
    EXPECT_EQ(file.document(3).last, 6);
    std::vector<int64_t> owners;
    for (int64_t token = 0; token < 6; ++token) owners.push_back(file.document_at(token));
    EXPECT_THAT(owners, ElementsAre(0, 0, 0, 2, 3, 3));
    EXPECT_EQ(summary.bin_bytes, 6 * size_of(type));
    EXPECT_EQ(summary.bin_xxh3, file.full_bin_hash());
    EXPECT_EQ(summary.idx_xxh3, file.full_idx_hash());
    EXPECT_FALSE(fs::exists(folder / "a.bin.partial"));
    EXPECT_FALSE(fs::exists(folder / "a.lengths.partial"));
  }
}

// The layout that other Megatron readers expect, byte for byte.
TEST(TokenFile, IndexBytes_AreTheMegatronLayout) {
  const TempFolder folder;
  write_pair(folder / "a", {{1, 2, 3}, {4}});
  const std::string expected =
      std::string("MMIDIDX\0\0", 9) + std::string("\1\0\0\0\0\0\0\0", 8) + '\x08' +
      std::string("\2\0\0\0\0\0\0\0", 8) + std::string("\3\0\0\0\0\0\0\0", 8) +
      std::string("\3\0\0\0\1\0\0\0", 8) + std::string("\0\0\0\0\0\0\0\0\6\0\0\0\0\0\0\0", 16) +
      std::string("\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0", 24);
  EXPECT_EQ(slurp(folder / "a.idx"), expected);
  EXPECT_EQ(slurp(folder / "a.bin"), std::string("\1\0\2\0\3\0\4\0", 8));
}

TEST(TokenFile, TypeFollowsVocabulary) {
  EXPECT_EQ(token_type_for(65499), TokenType::kUint16);
  EXPECT_EQ(token_type_for(65500), TokenType::kInt32);
}

TEST(TokenFile, PrefixMayCarryAnEnding) {
  const TempFolder folder;
  write_pair(folder / "a.b", {{1, 2}});
  EXPECT_EQ(TokenFile(folder / "a.b").tokens(), 2);
  EXPECT_EQ(TokenFile(folder / "a.b.bin").tokens(), 2);
  EXPECT_EQ(TokenFile(folder / "a.b.idx").tokens(), 2);
}

TEST(TokenFile, MissingHalf_IsNamed) {
  const TempFolder folder;
  const auto open = [&] { TokenFile file(folder / "a"); };
  EXPECT_THAT(message_of<ConfigError>(open), HasSubstr("a.idx"));
  write_pair(folder / "a", {{1}});
  fs::remove(folder / "a.bin");
  EXPECT_THAT(message_of<ConfigError>(open), HasSubstr("a.bin"));
  write_pair(folder / "a", {{1}});
  fs::remove(folder / "a.idx");
  EXPECT_THAT(message_of<ConfigError>(open), HasSubstr("unfinished"));
}

TEST(TokenFile, ShortBin_IsNamed) {
  const TempFolder folder;
  write_pair(folder / "a", {{1, 2, 3}});
  fs::resize_file(folder / "a.bin", 4);
  EXPECT_THAT(message_of<DataError>([&] { TokenFile file(folder / "a"); }),
              HasSubstr("shorter than its index"));
}

TEST(TokenFile, WriterRefusesIdsOutsideTheType) {
  const TempFolder folder;
  TokenWriter writer(folder / "a", TokenType::kUint16);
  EXPECT_THAT(message_of<DataError>([&] { writer.add_document(Document{70000}); }),
              HasSubstr("token id 70000"));
  EXPECT_THAT(message_of<DataError>([&] { writer.add_document(Document{-1}); }),
              HasSubstr("token id -1"));
}

TEST(TokenFile, WriterDropped_LeavesNothing) {
  const TempFolder folder;
  {
    TokenWriter writer(folder / "a", TokenType::kUint16);
    writer.add_document(Document{1});
    (void)writer.finish();
    writer.set_provenance("{}");
  }
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(TokenFile, ChangeOnDisk_IsNoticed) {
  const TempFolder folder;
  const auto check = [&](const std::function<void()>& change, const char* words) {
    write_pair(folder / "a", {{1, 2, 3}});
    const TokenFile file(folder / "a");
    EXPECT_NO_THROW(file.check_unchanged());
    change();
    EXPECT_THAT(message_of<DataError>([&] { file.check_unchanged(); }), HasSubstr(words));
  };
  check([&] { fs::resize_file(folder / "a.bin", 2); }, "a file of 2 bytes");
  check([&] { fs::remove(folder / "a.bin"); }, "no file any more");
  check([&] { fs::remove(folder / "a.idx"); }, "no file any more");
  check(
      [&] {
        fs::copy_file(folder / "a.bin", folder / "copy");
        fs::rename(folder / "copy", folder / "a.bin");
      },
      "another file of the same name");
  check([&] { fs::last_write_time(folder / "a.bin", fs::file_time_type(std::chrono::seconds(1))); },
        "written to meanwhile");
}

// Runs `body` in a child; returns its exit status and what it wrote to stderr.
std::pair<int, std::string> run_child(const std::function<void()>& body) {
  int pipe_ends[2];
  if (::pipe(pipe_ends) != 0) throw std::runtime_error("pipe");
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(pipe_ends[1], STDERR_FILENO);
    ::close(pipe_ends[0]);
    body();
    ::_exit(0);
  }
  ::close(pipe_ends[1]);
  std::string text(8192, '\0');
  size_t size = 0;
  for (ssize_t n; (n = ::read(pipe_ends[0], text.data() + size, text.size() - size)) > 0;)
    size += size_t(n);
  ::close(pipe_ends[0]);
  text.resize(size);
  int status = 0;
  ::waitpid(child, &status, 0);
  return {status, text};
}

TEST(TokenFile, CutWhileMapped_EndsWith94AndNamesFileAndOffset) {
  const TempFolder folder;
  write_pair(folder / "a", {Document(100000, 7)});
  const auto [status, text] = run_child([&] {
    const TokenFile file(folder / "a");
    fs::resize_file(folder / "a.bin", 4096);
    std::vector<int64_t> ids(10);
    file.read(50000, ids);
  });
  ASSERT_TRUE(WIFEXITED(status)) << status << " " << text;
  EXPECT_EQ(WEXITSTATUS(status), 94);
  EXPECT_THAT(text, HasSubstr("a.bin"));
  EXPECT_THAT(text, HasSubstr("byte 100000"));
  EXPECT_THAT(text, HasSubstr("need 200000 bytes"));
}

TEST(TokenFile, ForeignSigbus_StillKills) {
  const TempFolder folder;
  write_pair(folder / "a", {{1, 2, 3}});
  spill(folder / "other", std::string(8192, 'x'));
  const auto [status, text] = run_child([&] {
    ::signal(SIGBUS, SIG_DFL);
    const TokenFile file(folder / "a");
    const MappedFile other(folder / "other");
    fs::resize_file(folder / "other", 0);
    const volatile std::byte touched = other.bytes()[5000];
    (void)touched;
  });
  EXPECT_TRUE(WIFSIGNALED(status)) << status << " " << text;
  EXPECT_EQ(WTERMSIG(status), SIGBUS);
}

TEST(TokenFile, ContentHash_SeesEveryPart) {
  const TempFolder folder;
  const auto hash = [&](const std::vector<Document>& documents) {
    write_pair(folder / "a", documents);
    return TokenFile(folder / "a").content_hash();
  };
  const std::string base = hash({{1, 2}, {3}});
  EXPECT_EQ(base, hash({{1, 2}, {3}}));
  EXPECT_NE(base, hash({{1}, {2, 3}}));
  EXPECT_NE(base, hash({{1, 2}, {4}}));
}

TEST(Inspect, ReportsSizesAndChecksIds) {
  const TempFolder folder;
  write_pair(folder / "a", {{1, 2, 3}, {}, {9}});
  const TokenFile file(folder / "a");
  const InspectReport report = inspect(file);
  EXPECT_EQ(report.documents, 3);
  EXPECT_EQ(report.tokens, 4);
  EXPECT_EQ(report.shortest, 0);
  EXPECT_EQ(report.median, 1);
  EXPECT_EQ(report.longest, 3);
  EXPECT_EQ(report.empty_documents, 1);
  EXPECT_EQ(report.largest_token, 9);
  EXPECT_FALSE(report.provenance.has_value());
  EXPECT_EQ(report.idx_bytes, static_cast<int64_t>(fs::file_size(folder / "a.idx")));
  EXPECT_NO_THROW((void)inspect(file, 10));
  EXPECT_THAT(message_of<DataError>([&] { (void)inspect(file, 9); }),
              HasSubstr("token id 9 at token 3, document 2"));
}

}  // namespace
}  // namespace capstan::data
