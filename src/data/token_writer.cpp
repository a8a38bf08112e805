// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/token_writer.h"

#include <fmt/format.h>

#include <cstring>
#include <filesystem>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "data/index_internal.h"

namespace capstan::data {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;

Path partial(const Path& path) { return Path(path.string() + ".partial"); }
Path lengths_path(const Path& prefix) { return Path(prefix.string() + ".lengths.partial"); }

// Collects small writes.
class Buffer {
 public:
  explicit Buffer(FileWriter& file) : file_(file) { bytes_.reserve(kBufferBytes); }
  template <class T>
  void put(T value) {
    if (bytes_.size() + sizeof value > kBufferBytes) flush();
    const size_t at = bytes_.size();
    bytes_.resize(at + sizeof value);
    std::memcpy(bytes_.data() + at, &value, sizeof value);
  }
  void flush() {
    if (!bytes_.empty()) file_.write(std::span<const std::byte>(bytes_));
    bytes_.clear();
  }

 private:
  FileWriter& file_;
  std::vector<std::byte> bytes_;
};

[[noreturn]] void refuse_document(const Path& prefix, int64_t index, std::string got,
                                  std::string need) {
  throw DataError(
      ErrorText{.module = "data",
                .what = fmt::format("writing document {} to {}", index, bin_path(prefix).string()),
                .got = std::move(got),
                .need = std::move(need)});
}

void write_header(Buffer& out, TokenType type, int64_t sequences) {
  for (const char c : index_layout::kMagic) out.put(c);
  out.put(index_layout::kVersion);
  out.put(static_cast<uint8_t>(type));
  out.put(static_cast<uint64_t>(sequences));
  out.put(static_cast<uint64_t>(sequences) + 1);
}

}  // namespace

// Lengths go to a file of their own first: the .idx needs all of them before the first pointer, and
// a corpus may have more documents than memory holds.
struct TokenWriter::State {
  Path prefix;
  TokenType type;
  FileWriter bin, lengths;
  Buffer bin_buffer, lengths_buffer;
  int64_t documents = 0, tokens = 0;
  bool finished = false, has_provenance = false, committed = false;

  State(Path path, TokenType token_type)
      : prefix(std::move(path)),
        type(token_type),
        bin(partial(bin_path(prefix))),
        lengths(lengths_path(prefix)),
        bin_buffer(bin),
        lengths_buffer(lengths) {}

  ~State() {
    if (!committed) remove_partials(prefix);
  }

  static void remove_partials(const Path& prefix) noexcept {
    std::error_code ignored;
    for (const Path& path : {partial(bin_path(prefix)), partial(idx_path(prefix)),
                             partial(provenance_path(prefix)), lengths_path(prefix)}) {
      std::filesystem::remove(path, ignored);
    }
  }
};

TokenWriter::TokenWriter(Path prefix, TokenType type) {
  if (prefix.has_parent_path()) create_directories_durable(prefix.parent_path());
  State::remove_partials(prefix);
  state_ = std::make_unique<State>(std::move(prefix), type);
}
TokenWriter::~TokenWriter() = default;
TokenWriter::TokenWriter(TokenWriter&&) noexcept = default;
TokenWriter& TokenWriter::operator=(TokenWriter&&) noexcept = default;

int64_t TokenWriter::documents() const { return state_->documents; }
int64_t TokenWriter::tokens() const { return state_->tokens; }

void TokenWriter::add_document(std::span<const int32_t> tokens) {
  State& s = *state_;
  CAPSTAN_CHECK(!s.finished, "{} was finished already", s.prefix.string());
  if (tokens.size() > size_t{std::numeric_limits<int32_t>::max()}) {
    refuse_document(s.prefix, s.documents, fmt::format("{} tokens", tokens.size()),
                    "fewer than 2^31, the most that an index can say");
  }
  const int32_t limit = s.type == TokenType::kUint16 ? 65535 : std::numeric_limits<int32_t>::max();
  for (const int32_t token : tokens) {
    if (token < 0 || token > limit) {
      refuse_document(s.prefix, s.documents, fmt::format("token id {}", token),
                      fmt::format("0 to {} ({})", limit, name_of(s.type)));
    }
    if (s.type == TokenType::kUint16) {
      s.bin_buffer.put(static_cast<uint16_t>(token));
    } else {
      s.bin_buffer.put(token);
    }
  }
  s.lengths_buffer.put(static_cast<int32_t>(tokens.size()));
  ++s.documents;
  s.tokens += static_cast<int64_t>(tokens.size());
}

PairSummary TokenWriter::finish() {
  State& s = *state_;
  CAPSTAN_CHECK(!s.finished, "{} was finished already", s.prefix.string());
  s.finished = true;
  s.bin_buffer.flush();
  s.lengths_buffer.flush();
  PairSummary summary{.documents = s.documents, .tokens = s.tokens, .bin_bytes = s.bin.size()};
  summary.bin_xxh3 = s.bin.close();
  s.lengths.close();

  FileWriter idx(partial(idx_path(s.prefix)));
  Buffer out(idx);
  write_header(out, s.type, s.documents);
  {
    const MappedFile lengths(lengths_path(s.prefix));
    const auto count = static_cast<size_t>(s.documents);
    for (size_t i = 0; i < count; ++i)
      out.put(index_layout::load<int32_t>(lengths.bytes(), i * sizeof(int32_t)));
    int64_t pointer = 0;
    for (size_t i = 0; i < count; ++i) {
      out.put(pointer);
      pointer += int64_t{index_layout::load<int32_t>(lengths.bytes(), i * sizeof(int32_t))} *
                 size_of(s.type);
    }
  }
  for (int64_t i = 0; i <= s.documents; ++i) out.put(i);
  out.flush();
  summary.idx_bytes = idx.size();
  summary.idx_xxh3 = idx.close();
  std::filesystem::remove(lengths_path(s.prefix));
  return summary;
}

void TokenWriter::set_provenance(std::string_view json) {
  FileWriter file(partial(provenance_path(state_->prefix)));
  file.write(json);
  file.close();
  state_->has_provenance = true;
}

void commit_pairs(std::span<TokenWriter* const> writers,
                  const std::function<void(std::string_view)>& stage) {
  std::set<Path> folders;
  for (const TokenWriter* writer : writers) {
    CAPSTAN_CHECK(writer->state_->finished, "{} is not finished", writer->state_->prefix.string());
    const Path parent = writer->state_->prefix.parent_path();
    folders.insert(parent.empty() ? Path(".") : parent);
  }
  const auto sync = [&] {
    for (const Path& folder : folders) fsync_directory(folder);
  };
  const auto tell = [&](const char* what, const Path& path) {
    if (stage) stage(fmt::format("{} {}", what, path.string()));
  };
  const auto rename = [&](const Path& path) {
    tell("rename", path);
    std::error_code error;
    std::filesystem::rename(partial(path), path, error);
    if (error) {
      throw EnvError(ErrorText{.module = "data",
                               .what = fmt::format("renaming {}", partial(path).string()),
                               .got = error.message(),
                               .need = fmt::format("the name {}", path.string())});
    }
  };

  for (const TokenWriter* writer : writers) {
    tell("remove", idx_path(writer->state_->prefix));
    std::filesystem::remove(idx_path(writer->state_->prefix));
  }
  sync();
  for (const TokenWriter* writer : writers) {
    const Path& prefix = writer->state_->prefix;
    if (writer->state_->has_provenance) {
      rename(provenance_path(prefix));
    } else {
      std::filesystem::remove(
          provenance_path(prefix));  // that of an older pair would describe this one wrongly
    }
    rename(bin_path(prefix));
  }
  sync();
  for (TokenWriter* writer : writers) {
    rename(idx_path(writer->state_->prefix));
    writer->state_->committed = true;
  }
  sync();
}

}  // namespace capstan::data
