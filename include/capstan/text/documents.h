// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Documents of a source, one after the other. A text file is one document; `.jsonl` holds one
// object per line; `.gz` and `.zst` around either are decompressed on the way.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "capstan/text/sources.h"

namespace capstan::text {

enum class BadLine {
  kStop,
  kSkip
};  // of JSONL: stop with FILE:LINE, or leave the line out and count it

struct DocumentOptions {
  std::string field = "text";  // of the JSONL objects; a string
  BadLine bad_lines = BadLine::kStop;
  int64_t max_line_bytes = int64_t{256} << 20;
  int64_t max_text_bytes = int64_t{16} << 30;  // of one text file, after decompression
  int64_t max_expansion = 1000;  // decompressed bytes per compressed byte, checked beyond 64 MiB
};

struct DocumentCounts {
  int64_t documents = 0, bytes = 0, bad_lines = 0;
  std::string first_bad_line;  // what was wrong with the first line left out
};

[[nodiscard]] bool is_jsonl(const Source& source);  // .jsonl, .jsonl.gz, .jsonl.zst, .ndjson...

// A source's bytes after decompression. Throws EnvError when it cannot be read and DataError when
// the compressed form is damaged, cut short or expands too far.
class ByteStream {
 public:
  ByteStream(const Path& path, int64_t max_expansion);
  ~ByteStream();
  ByteStream(ByteStream&&) noexcept;
  ByteStream& operator=(ByteStream&&) noexcept;
  [[nodiscard]] size_t read(char* data, size_t size);  // 0 only at the end

  class Decoder;

 private:
  std::unique_ptr<Decoder> decoder_;
};

// Pull form. Not thread-safe; one reader per source.
class DocumentReader {
 public:
  DocumentReader(Source source, DocumentOptions options);
  ~DocumentReader();
  DocumentReader(DocumentReader&&) noexcept;
  DocumentReader& operator=(DocumentReader&&) noexcept;
  // False at the end. A byte order mark at the start of the file is dropped; text is otherwise kept
  // as it is, invalid UTF-8 included (in JSONL that is a bad line). Empty documents are left out.
  [[nodiscard]] bool next(std::string& document);
  [[nodiscard]] int64_t line()
      const;  // of the last document in a JSONL file, counted from 1; else 0
  [[nodiscard]] const DocumentCounts& counts() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Calls `take` for every document. Exceptions of `take` pass through.
DocumentCounts read_documents(const Source& source, const DocumentOptions& options,
                              const std::function<void(std::string_view document)>& take);
DocumentCounts read_documents(const Source& source, std::string_view field,
                              const std::function<void(std::string_view document)>& take);

}  // namespace capstan::text
