// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/token_file.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "data/mapping_guard.h"

namespace capstan::data {
namespace {

// What tells one file on disk from another under the same name.
struct FileIdentity {
  uint64_t inode = 0;
  int64_t size = 0, modified_ns = 0;
  bool operator==(const FileIdentity&) const = default;
};

std::optional<FileIdentity> try_identify(const Path& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return std::nullopt;
  return FileIdentity{info.st_ino, info.st_size,
                      int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec};
}

Path add_ending(const Path& prefix, const char* ending) { return Path(prefix.string() + ending); }

Path strip_ending(const Path& path) {
  const Path ending = path.extension();
  return ending == ".bin" || ending == ".idx" ? Path(path).replace_extension() : path;
}

void check_pair_exists(const Path& prefix) {
  const bool has_bin = try_identify(bin_path(prefix)).has_value();
  const bool has_idx = try_identify(idx_path(prefix)).has_value();
  if (has_bin && has_idx) return;
  const std::string missing = (has_idx ? bin_path(prefix) : idx_path(prefix)).string();
  throw ConfigError(
      ErrorText{.module = "data",
                .what = fmt::format("opening token files {}", prefix.string()),
                .got = fmt::format("no file {}", missing),
                .need = "a pair PREFIX.bin and PREFIX.idx",
                .why = has_bin || has_idx ? "an unfinished or half copied pair is never read" : "",
                .fix = fmt::format("Make it with `capstan data prepare --input ... --output {}`",
                                   prefix.string())});
}

struct MappedPart {
  MappedFile file;
  MappingGuard guard;
  FileIdentity identity;

  explicit MappedPart(const Path& path) : file(path), guard(file.bytes(), path.string()) {
    const auto now = try_identify(path);
    identity = now.value_or(FileIdentity{});
    if (!now || now->size != static_cast<int64_t>(file.bytes().size())) fail(now);
  }

  void check() const {
    const auto now = try_identify(file.path());
    if (!now || *now != identity) fail(now);
  }

  [[noreturn]] void fail(const std::optional<FileIdentity>& now) const {
    const auto mapped = static_cast<int64_t>(file.bytes().size());
    std::string got = !now                           ? std::string("no file any more")
                      : now->size != mapped          ? fmt::format("a file of {} bytes", now->size)
                      : now->inode != identity.inode ? std::string("another file of the same name")
                                                     : std::string("a file written to meanwhile");
    throw DataError(ErrorText{.module = "data",
                              .what = fmt::format("reading {}", file.path().string()),
                              .got = std::move(got),
                              .need = fmt::format("the {} bytes that were opened", mapped),
                              .why = "token files must not change while they are in use",
                              .fix = "Restore the file or prepare it again, then resume"});
  }
};

}  // namespace

std::string_view name_of(TokenType type) { return type == TokenType::kUint16 ? "uint16" : "int32"; }

TokenType token_type_for(int64_t vocab_size) {
  return vocab_size < 65500 ? TokenType::kUint16 : TokenType::kInt32;
}

Path bin_path(const Path& prefix) { return add_ending(prefix, ".bin"); }
Path idx_path(const Path& prefix) { return add_ending(prefix, ".idx"); }
Path provenance_path(const Path& prefix) { return add_ending(prefix, ".json"); }

struct TokenFile::State {
  Path prefix;
  MappedPart bin, idx;
  IndexView index;

  explicit State(const Path& path)
      : prefix(path),
        bin(bin_path(path)),
        idx(idx_path(path)),
        index(idx.file.bytes(), static_cast<int64_t>(bin.file.bytes().size()),
              idx_path(path).string()) {}
};

TokenFile::TokenFile(const Path& prefix) {
  const Path bare = strip_ending(prefix);
  check_pair_exists(bare);
  state_ = std::make_unique<State>(bare);
}
TokenFile::~TokenFile() = default;
TokenFile::TokenFile(TokenFile&&) noexcept = default;
TokenFile& TokenFile::operator=(TokenFile&&) noexcept = default;

const Path& TokenFile::prefix() const { return state_->prefix; }
TokenType TokenFile::type() const { return state_->index.type(); }
int64_t TokenFile::idx_bytes() const {
  return static_cast<int64_t>(state_->idx.file.bytes().size());
}
int64_t TokenFile::sequences() const { return state_->index.sequences(); }
int64_t TokenFile::documents() const { return state_->index.documents(); }
int64_t TokenFile::tokens() const { return state_->index.tokens(); }
TokenRange TokenFile::document(int64_t index) const { return state_->index.document(index); }

int64_t TokenFile::document_at(int64_t token) const {
  CAPSTAN_CHECK(token >= 0 && token < tokens(), "token {} of {}", token, tokens());
  // The first document that ends behind the token; empty documents end before it.
  int64_t low = 0, high = documents() - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (document(middle).last > token) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

void TokenFile::read(int64_t first, std::span<int64_t> out) const {
  const auto count = static_cast<int64_t>(out.size());
  CAPSTAN_CHECK(first >= 0 && count <= tokens() && first <= tokens() - count,
                "tokens {} + {} of {}", first, count, tokens());
  const std::byte* source = state_->bin.file.bytes().data() + first * size_of(type());
  if (type() == TokenType::kUint16) {
    uint16_t value;
    for (size_t i = 0; i < out.size(); ++i) {
      std::memcpy(&value, source + i * sizeof value, sizeof value);
      out[i] = value;
    }
  } else {
    int32_t value;
    for (size_t i = 0; i < out.size(); ++i) {
      std::memcpy(&value, source + i * sizeof value, sizeof value);
      out[i] = value;
    }
  }
}

void TokenFile::check_unchanged() const {
  state_->bin.check();
  state_->idx.check();
}

std::string TokenFile::content_hash() const {
  constexpr size_t kWhole = size_t{64} << 20, kBlock = 4096, kBlocks = 1024;
  const std::span<const std::byte> bin = state_->bin.file.bytes();
  Hasher hasher;
  hasher.update(fmt::format("{} {}\n", bin.size(), state_->idx.file.bytes().size()));
  hasher.update(state_->idx.file.bytes());
  if (bin.size() <= kWhole) {
    hasher.update(bin);
  } else {
    const size_t stride = (bin.size() - kBlock) / (kBlocks - 1);
    for (size_t i = 0; i < kBlocks; ++i) hasher.update(bin.subspan(i * stride, kBlock));
  }
  return hasher.hex();
}

std::string TokenFile::full_bin_hash() const { return xxh3_128_hex(state_->bin.file.bytes()); }
std::string TokenFile::full_idx_hash() const { return xxh3_128_hex(state_->idx.file.bytes()); }

}  // namespace capstan::data
