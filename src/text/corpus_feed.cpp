// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <memory>
#include <optional>

#include "text/unicode.h"
#include "text/word_counter.h"

namespace capstan::text {
namespace {

constexpr size_t kChunk = size_t{1} << 20;
constexpr size_t kLongestPart = size_t{64} << 20;  // of a text without any place to cut

bool is_visible(char c) { return c > ' ' && c < '\x7f'; }

size_t last_cut(std::string_view text) {
  for (size_t at = text.size(); at-- > 2;) {
    if (text[at - 1] == '\n' && is_visible(text[at]) && is_visible(text[at - 2])) return at;
  }
  return std::string_view::npos;
}

// One plain text file, in blocks that end at a cut.
class TextBlocks {
 public:
  explicit TextBlocks(ByteStream stream) : stream_(std::move(stream)) {}

  bool next(std::string& part) {
    while (!ended_ && rest_.size() < kLongestPart) {
      fill();
      if (const size_t cut = last_cut(rest_); cut != std::string_view::npos) {
        return give(cut, part);
      }
    }
    if (rest_.empty()) return false;
    const size_t whole = ended_ ? rest_.size() : last_character(rest_);
    return give(whole, part);
  }

 private:
  void fill() {
    const size_t before = rest_.size();
    rest_.resize(before + kChunk);
    size_t size = before;
    while (size < rest_.size()) {
      const size_t count = stream_.read(rest_.data() + size, rest_.size() - size);
      if (count == 0) break;
      size += count;
    }
    ended_ = size < rest_.size();
    rest_.resize(size);
    if (first_ && rest_.starts_with("\xef\xbb\xbf")) rest_.erase(0, 3);
    first_ = false;
  }
  bool give(size_t size, std::string& part) {
    part.assign(rest_, 0, size);
    rest_.erase(0, size);
    return true;
  }

  ByteStream stream_;
  std::string rest_;
  bool first_ = true, ended_ = false;
};

class SourceParts {
 public:
  SourceParts(std::span<const Source> sources, DocumentOptions documents)
      : sources_(sources.begin(), sources.end()), documents_(std::move(documents)) {}

  bool next(std::string& part) {
    for (;;) {
      if (reader_ && reader_->next(part)) return true;
      if (blocks_ && blocks_->next(part)) return true;
      reader_.reset();
      blocks_.reset();
      if (at_ == sources_.size()) return false;
      const Source& source = sources_[at_++];
      if (is_jsonl(source)) {
        reader_.emplace(source, documents_);
      } else {
        blocks_.emplace(ByteStream(source.path, documents_.max_expansion));
      }
    }
  }

 private:
  std::vector<Source> sources_;
  DocumentOptions documents_;
  size_t at_ = 0;
  std::optional<DocumentReader> reader_;
  std::optional<TextBlocks> blocks_;
};

}  // namespace

size_t next_cut(std::string_view text, size_t from) {
  for (size_t at = std::max<size_t>(from, 1); at + 1 < text.size(); ++at) {
    const void* newline = std::memchr(text.data() + at, '\n', text.size() - at);
    if (!newline) break;
    at = static_cast<size_t>(static_cast<const char*>(newline) - text.data());
    if (at + 1 < text.size() && is_visible(text[at - 1]) && is_visible(text[at + 1])) return at + 1;
  }
  return std::string_view::npos;
}

bool CorpusFeed::next(std::string& chunk) {
  while (at_ >= part_.size()) {
    at_ = 0;
    if (!next_(part_)) {
      part_.clear();
      return false;
    }
  }
  const size_t cut =
      part_.size() - at_ <= kChunk ? std::string_view::npos : next_cut(part_, at_ + kChunk);
  const size_t end = cut == std::string_view::npos ? part_.size() : cut;
  if (at_ == 0 && end == part_.size()) {
    chunk.swap(part_);
    part_.clear();
  } else {
    chunk.assign(part_, at_, end - at_);
  }
  at_ = end;
  return true;
}

NextText read_sources(std::span<const Source> sources, const DocumentOptions& documents) {
  const auto parts = std::make_shared<SourceParts>(sources, documents);
  return [parts](std::string& part) { return parts->next(part); };
}

}  // namespace capstan::text
