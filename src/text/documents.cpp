// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/documents.h"

#include <fmt/format.h>

#include <cstring>
#include <optional>
#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/text.h"

namespace capstan::text {
namespace {

constexpr size_t kBlock = 256 * 1024;
constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
constexpr int kMaxDepth = 64;

// Lines of a stream; a final line without its newline counts.
class LineReader {
 public:
  LineReader(ByteStream stream, int64_t limit)
      : stream_(std::move(stream)), limit_(static_cast<size_t>(limit)), block_(kBlock) {}

  // False at the end. A line beyond the limit is skipped to its end and given as nullopt.
  bool next(std::optional<std::string>& line) {
    std::string text;
    bool any = false, too_long = false;
    for (;;) {
      if (at_ == size_ && !refill()) break;
      any = true;
      const char* const start = block_.data() + at_;
      const auto* newline = static_cast<const char*>(std::memchr(start, '\n', size_ - at_));
      const size_t count = newline ? static_cast<size_t>(newline - start) : size_ - at_;
      too_long |= text.size() + count > limit_;
      if (too_long) {
        std::string().swap(text);
      } else {
        text.append(start, count);
      }
      at_ += count + (newline ? 1 : 0);
      if (newline) break;
    }
    if (!any) return false;
    if (too_long) {
      line.reset();
    } else {
      line = std::move(text);
    }
    return true;
  }

 private:
  bool refill() {
    size_ = stream_.read(block_.data(), block_.size());
    at_ = 0;
    return size_ > 0;
  }
  ByteStream stream_;
  size_t limit_;
  std::vector<char> block_;
  size_t at_ = 0, size_ = 0;
};

std::string read_all(ByteStream& stream, const Source& source, int64_t limit) {
  std::string text;
  for (;;) {
    const size_t before = text.size();
    text.resize(before + std::max(kBlock, before / 2));
    const size_t count = stream.read(text.data() + before, text.size() - before);
    text.resize(before + count);
    if (count == 0) return text;
    if (static_cast<int64_t>(text.size()) > limit) {
      throw DataError({.module = "text",
                       .what = "reading " + source.path.string(),
                       .got = "more than " + format_bytes(limit),
                       .need = "a text that fits into memory as one document",
                       .fix = "Split the file, or give JSONL with one document per line"});
    }
  }
}

}  // namespace

bool is_jsonl(const Source& source) {
  Path name = source.path.filename();
  if (name.extension() == ".gz" || name.extension() == ".zst") name = name.stem();
  return name.extension() == ".jsonl" || name.extension() == ".ndjson";
}

struct DocumentReader::State {
  Source source;
  DocumentOptions options;
  DocumentCounts counts;
  std::optional<LineReader> lines;
  bool done = false;
  int64_t line = 0;

  bool next_text(std::string& document) {
    if (done) return false;
    done = true;
    ByteStream stream(source.path, options.max_expansion);
    document = read_all(stream, source, options.max_text_bytes);
    if (document.starts_with(kByteOrderMark)) document.erase(0, kByteOrderMark.size());
    return !document.empty();
  }

  bool next_line(std::string& document) {
    std::optional<std::string> text;
    while (lines->next(text)) {
      ++line;
      if (line == 1 && text && text->starts_with(kByteOrderMark)) text->erase(0, 3);
      if (text && text->find_first_not_of(" \t\r") == std::string::npos) continue;
      try {
        if (!text) throw_too_long();
        document = field_of(*text);
      } catch (const DataError& error) {
        if (options.bad_lines == BadLine::kStop) throw;
        if (counts.bad_lines++ == 0) counts.first_bad_line = error.what();
        continue;
      }
      if (!document.empty()) return true;
    }
    return false;
  }

  [[nodiscard]] std::string place() const {
    return fmt::format("{}:{}", source.path.string(), line);
  }

  [[noreturn]] void throw_too_long() const {
    throw DataError({.module = "text",
                     .what = "reading " + place(),
                     .got = "a line of more than " + format_bytes(options.max_line_bytes),
                     .need = "shorter lines"});
  }

  [[nodiscard]] std::string field_of(const std::string& text) const {
    json::Json object =
        json::parse(text, place(), {.depth = kMaxDepth, .bytes = options.max_line_bytes});
    const auto fail = [&](const std::string& got, const std::string& need) {
      throw DataError({.module = "text",
                       .what = "reading " + place(),
                       .got = got,
                       .need = need,
                       .fix = "Name the field with --field"});
    };
    if (!object.is_object()) fail(object.type_name(), "a JSON object per line");
    const auto found = object.find(options.field);
    if (found == object.end()) {
      std::vector<std::string> names;
      for (const auto& item : object.items()) names.push_back(quote(item.key(), 40));
      if (names.size() > 8) names.resize(8);
      fail("no field " + quote(options.field), "one of " + join(names, ", "));
    }
    if (!found->is_string())
      fail(quote(options.field) + " of type " + found->type_name(), "a string");
    return std::move(found->get_ref<std::string&>());
  }
};

DocumentReader::DocumentReader(Source source, DocumentOptions options)
    : state_(std::make_unique<State>()) {
  state_->source = std::move(source);
  state_->options = std::move(options);
  if (!is_jsonl(state_->source)) return;
  state_->lines.emplace(ByteStream(state_->source.path, state_->options.max_expansion),
                        state_->options.max_line_bytes);
}

DocumentReader::~DocumentReader() = default;
DocumentReader::DocumentReader(DocumentReader&&) noexcept = default;
DocumentReader& DocumentReader::operator=(DocumentReader&&) noexcept = default;

bool DocumentReader::next(std::string& document) {
  State& state = *state_;
  const bool found = state.lines ? state.next_line(document) : state.next_text(document);
  if (!found) return false;
  ++state.counts.documents;
  state.counts.bytes += static_cast<int64_t>(document.size());
  return true;
}

int64_t DocumentReader::line() const { return state_->line; }
const DocumentCounts& DocumentReader::counts() const { return state_->counts; }

DocumentCounts read_documents(const Source& source, const DocumentOptions& options,
                              const std::function<void(std::string_view document)>& take) {
  DocumentReader reader(source, options);
  std::string document;
  while (reader.next(document)) take(document);
  return reader.counts();
}

DocumentCounts read_documents(const Source& source, std::string_view field,
                              const std::function<void(std::string_view document)>& take) {
  return read_documents(source, DocumentOptions{.field = std::string(field)}, take);
}

}  // namespace capstan::text
