// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Token files in the Megatron form: PREFIX.bin holds the token ids of all documents one after
// another, PREFIX.idx says where each begins (docs/data-format.md). Both are little-endian and are
// read by mapping. Nothing in a file is trusted: every field is checked when it is opened, and a
// file that shrinks while it is mapped ends the process with a named error and exit code 94 instead
// of a bare SIGBUS.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "capstan/base/file.h"

namespace capstan::data {

// Element types of a .bin, by their code in the .idx.
enum class TokenType : uint8_t { kInt32 = 4, kUint16 = 8 };
[[nodiscard]] constexpr int64_t size_of(TokenType type) {
  return type == TokenType::kUint16 ? 2 : 4;
}
[[nodiscard]] std::string_view name_of(TokenType type);
// Megatron's rule: uint16 below a vocabulary of 65,500, else int32.
[[nodiscard]] TokenType token_type_for(int64_t vocab_size);

[[nodiscard]] Path bin_path(const Path& prefix);
[[nodiscard]] Path idx_path(const Path& prefix);
[[nodiscard]] Path provenance_path(const Path& prefix);  // PREFIX.json

// Half-open range of tokens, counted from the start of the .bin.
struct TokenRange {
  int64_t first = 0, last = 0;
  [[nodiscard]] int64_t size() const { return last - first; }
};

// A checked view of the bytes of an .idx; the bytes must outlive it. Reading is thread-safe.
class IndexView {
 public:
  // `origin` names the file in errors; `bin_bytes` is the size of the .bin. Throws DataError on any
  // field.
  IndexView(std::span<const std::byte> bytes, int64_t bin_bytes, const std::string& origin);
  [[nodiscard]] TokenType type() const { return type_; }
  [[nodiscard]] int64_t sequences() const { return sequences_; }
  [[nodiscard]] int64_t documents() const { return documents_; }
  [[nodiscard]] int64_t tokens() const { return tokens_; }
  [[nodiscard]] TokenRange document(int64_t index) const;

 private:
  [[nodiscard]] int32_t length(int64_t sequence) const;
  [[nodiscard]] int64_t pointer(int64_t sequence) const;
  [[nodiscard]] int64_t first_sequence(int64_t document) const;  // documents() itself gives the end
  [[nodiscard]] int64_t token_at(int64_t sequence) const;        // first token of a sequence
  void read_header(const std::string& origin);
  void check_sequences(int64_t bin_bytes, const std::string& origin);
  void check_documents(const std::string& origin) const;

  std::span<const std::byte> bytes_;
  TokenType type_ = TokenType::kInt32;
  int64_t sequences_ = 0, documents_ = 0, tokens_ = 0;
};

// A pair opened for reading. Movable; all const members are thread-safe.
class TokenFile {
 public:
  // `prefix` without .bin/.idx (either ending is accepted). A missing pair throws ConfigError, a
  // damaged one DataError.
  explicit TokenFile(const Path& prefix);
  ~TokenFile();
  TokenFile(TokenFile&&) noexcept;
  TokenFile& operator=(TokenFile&&) noexcept;

  [[nodiscard]] const Path& prefix() const;
  [[nodiscard]] TokenType type() const;
  [[nodiscard]] int64_t idx_bytes() const;
  [[nodiscard]] int64_t sequences() const;
  [[nodiscard]] int64_t documents() const;
  [[nodiscard]] int64_t tokens() const;
  [[nodiscard]] TokenRange document(int64_t index) const;
  // The document that holds a token, by binary search.
  [[nodiscard]] int64_t document_at(int64_t token) const;
  // Copies tokens [first, first + out.size()). Ids are as stored, so unchecked against any
  // vocabulary.
  void read(int64_t first, std::span<int64_t> out) const;

  // Throws DataError when the pair on disk is no longer the one that was opened (deleted, replaced,
  // resized).
  void check_unchanged() const;
  // Identity of the content: sizes, the whole .idx and blocks spread over the .bin. Cheap on any
  // size.
  [[nodiscard]] std::string content_hash() const;
  // XXH3-128 over every byte, as `data prepare` records it; reads the whole file.
  [[nodiscard]] std::string full_bin_hash() const;
  [[nodiscard]] std::string full_idx_hash() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace capstan::data
