// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/documents.h"

#include <gmock/gmock.h>
#include <zlib.h>
#include <zstd.h>

#include "capstan/base/error.h"
#include "tiny_tokenizer.h"

namespace capstan::text {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string gzip(const std::string& text) {
  z_stream stream{};
  deflateInit2(&stream, 1, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string zstd(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

Source source_of(const Path& path) { return {path, path.filename().string(), 0}; }

std::vector<std::string> all(const Path& path, const DocumentOptions& options = {},
                             DocumentCounts* counts = nullptr) {
  std::vector<std::string> documents;
  const auto found = read_documents(source_of(path), options, [&](std::string_view document) {
    documents.emplace_back(document);
  });
  if (counts) *counts = found;
  return documents;
}

TEST(Documents, TextFileIsOneDocument) {
  const TemporaryFolder folder;
  EXPECT_THAT(all(folder.write("a.txt", "one\r\ntwo\n")), ElementsAre("one\r\ntwo\n"));
  EXPECT_THAT(all(folder.write("bom.txt", "\xef\xbb\xbfone")), ElementsAre("one"));
  EXPECT_THAT(all(folder.write("empty.txt", "")), ElementsAre());
  EXPECT_THAT(all(folder.write("bad.txt", "a\xff")), ElementsAre("a\xff"));
}

TEST(Documents, JsonLines) {
  const TemporaryFolder folder;
  const Path file = folder.write(
      "a.jsonl",
      "\xef\xbb\xbf{\"text\": \"one\"}\r\n\n  \n{\"id\": 3, \"text\": \"z\\u00e9\\nx\"}\n"
      "{\"text\": \"\"}\n{\"text\": \"last\"}");
  DocumentCounts counts;
  EXPECT_THAT(all(file, {}, &counts), ElementsAre("one", "zé\nx", "last"));
  EXPECT_EQ(counts.documents, 3);
  EXPECT_EQ(counts.bytes, 3 + 5 + 4);
  EXPECT_THAT(all(folder.write("b.ndjson", "{\"body\": \"x\"}\n"), {.field = "body"}),
              ElementsAre("x"));
  DocumentReader reader(source_of(file), {});
  std::string document;
  ASSERT_TRUE(reader.next(document) && reader.next(document));
  EXPECT_EQ(reader.line(), 4);
}

TEST(Documents, BadLines_StopWithTheirPlaceOrAreCounted) {
  const TemporaryFolder folder;
  const std::vector<std::pair<std::string, const char*>> lines = {
      {"{\"text\": \"a\xff\"}", "UTF-8"},
      {"{\"other\": \"a\", \"third\": 1}", "'other', 'third'"},
      {"{\"text\": 3}", "number"},
      {"[\"text\"]", "array"},
      {"{\"text\": \"a\"", ":2"},
      {"{\"text\": \"\\ud800\"}", ":2"},
      {"{\"text\": \"a\", \"text\": \"b\"}", "text"},
      {"{\"text\": \"a\", \"x\": " + std::string(100000, '[') + "}", ":2"},
      {"{\"text\": \"" + std::string(5000, 'x') + "\"}", "more than"},
      {"plain words", ":2"},
  };
  int number = 0;
  for (const auto& [line, word] : lines) {
    const Path file = folder.write(std::to_string(number++) + ".jsonl",
                                   "{\"text\": \"first\"}\n" + line + "\n{\"text\": \"last\"}\n");
    DocumentOptions options;
    options.max_line_bytes = word == std::string("more than") ? 4000 : options.max_line_bytes;
    const std::string text = message_of<DataError>([&] { (void)all(file, options); });
    EXPECT_THAT(text, HasSubstr(file.string() + ":2"));
    EXPECT_THAT(text, HasSubstr(word));
    options.bad_lines = BadLine::kSkip;
    DocumentCounts counts;
    EXPECT_THAT(all(file, options, &counts), ElementsAre("first", "last"));
    EXPECT_EQ(counts.bad_lines, 1);
    EXPECT_THAT(counts.first_bad_line, HasSubstr(":2"));
  }
}

TEST(Documents, Compressed) {
  const TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 100000; ++i) text += "line " + std::to_string(i * 7919 % 100003) + "\n";
  EXPECT_THAT(all(folder.write("a.txt.gz", gzip(text))), ElementsAre(text));
  EXPECT_THAT(all(folder.write("a.txt.zst", zstd(text))), ElementsAre(text));
  EXPECT_THAT(all(folder.write("two.gz", gzip("one ") + gzip("two"))), ElementsAre("one two"));
  EXPECT_THAT(all(folder.write("two.zst", zstd("one ") + zstd("two"))), ElementsAre("one two"));
  EXPECT_THAT(all(folder.write("a.jsonl.gz", gzip("{\"text\": \"x\"}\n"))), ElementsAre("x"));
  EXPECT_THAT(all(folder.write("a.jsonl.zst", zstd("{\"text\": \"y\"}"))), ElementsAre("y"));
}

TEST(Documents, DamagedCompression_IsAnError) {
  const TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 20000; ++i) text += std::to_string(i * 7919 % 10007);
  for (const auto& [name, whole] :
       {std::pair("a.gz", gzip(text)), std::pair("a.zst", zstd(text))}) {
    for (const double part : {0.0, 0.01, 0.5, 0.999}) {
      const auto size = static_cast<size_t>(static_cast<double>(whole.size()) * part);
      const Path file = folder.write(name, whole.substr(0, size));
      EXPECT_THAT(message_of<DataError>([&] { (void)all(file); }), HasSubstr("end of the file"))
          << name << " " << part;
    }
    std::string broken = whole;
    for (size_t i = 0; i < 8; ++i)
      broken[whole.size() / 2 + i] = static_cast<char>(~broken[whole.size() / 2 + i]);
    const Path file = folder.write(name, broken);
    // zstd frames made by ZSTD_compress carry no checksum; what decodes anyway differs.
    try {
      EXPECT_NE(all(file).front(), text);
    } catch (const DataError& error) {
      EXPECT_THAT(error.what(), HasSubstr(file.string()));
    }
    EXPECT_THAT(
        message_of<DataError>([&] { (void)all(folder.write(name, "no such stream, only text")); }),
        HasSubstr("decompressing"));
    const Path trailing = folder.write(name, whole + "garbage");
    EXPECT_THAT(message_of<DataError>([&] { (void)all(trailing); }), HasSubstr("decompressing"));
  }
}

TEST(Documents, ExpansionIsLimited) {
  const TemporaryFolder folder;
  const std::string zeros(66 << 20, 'a');
  for (const Path& file : {folder.write("b.gz", gzip(zeros)), folder.write("b.zst", zstd(zeros))}) {
    EXPECT_THAT(message_of<DataError>([&] { (void)all(file, {.max_expansion = 100}); }),
                HasSubstr("per compressed byte"));
  }
  EXPECT_THAT(message_of<DataError>([&] {
                (void)all(folder.write("c.txt", std::string(1 << 20, 'a')),
                          {.max_text_bytes = 1000});
              }),
              HasSubstr("as one document"));
}

TEST(Documents, MissingFile) {
  EXPECT_THAT(message_of<EnvError>([] { (void)all("/nonexistent/a.txt"); }),
              HasSubstr("/nonexistent/a.txt"));
}

}  // namespace
}  // namespace capstan::text
