// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE tokenizers in the Hugging Face form (tokenizer.json): GPT-2, Llama 3, Qwen and
// what capstan trains itself. Ids equal those of the `tokenizers` package on valid UTF-8. Bytes
// that are not valid UTF-8 become one token each, so decode(encode(x)) == x for every x unless the
// file asks for a normalizer, a prefix space or tokens that swallow whitespace (lstrip, rstrip).
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "capstan/base/file.h"

namespace capstan::text {

struct EncodeOptions {
  bool add_special = false;  // what the post-processor adds, e.g. the token that begins a text
  bool parse_special =
      false;  // special tokens written in the text become tokens; false: plain text
};

struct DecodeOptions {
  bool skip_special = false;
};

// A small handle over immutable shared state. All members are const and may be called from any
// number of threads at once; each thread keeps its own cache of pieces (2 MiB per tokenizer, at
// most two).
class Tokenizer {
 public:
  // A folder with tokenizer.json, or the file itself; tokenizer_config.json beside it names the
  // special tokens. Throws ConfigError when it is missing and DataError when it cannot be honoured.
  [[nodiscard]] static Tokenizer load(const Path& path);
  // The same from memory. `origin` names the source in errors; `config` is the text of
  // tokenizer_config.json, empty when there is none.
  [[nodiscard]] static Tokenizer parse(std::string_view json, std::string_view origin,
                                       std::string_view config = {});

  // Throws DataError when the text needs a byte that the vocabulary does not have, and when a
  // pattern runs into its match limit.
  [[nodiscard]] std::vector<int32_t> encode(std::string_view text,
                                            const EncodeOptions& options = {}) const;
  // The bytes of the tokens, joined. Throws DataError for an id outside the vocabulary.
  [[nodiscard]] std::string decode(std::span<const int32_t> ids,
                                   const DecodeOptions& options = {}) const;

  [[nodiscard]] int64_t vocab_size() const;  // largest id + 1; ids have no gaps
  // The bytes a token stands for; the view lives as long as any copy of this tokenizer.
  [[nodiscard]] std::string_view token_bytes(int32_t id) const;
  [[nodiscard]] std::optional<int32_t> id_of(
      std::string_view token) const;  // as written in the file
  [[nodiscard]] bool is_special(int32_t id) const;
  [[nodiscard]] std::span<const int32_t> special_ids() const;  // ascending
  [[nodiscard]] std::optional<int32_t> eos_id() const;
  [[nodiscard]] std::optional<int32_t> bos_id() const;
  [[nodiscard]] const std::string& fingerprint() const;  // XXH3-128 of tokenizer.json
  [[nodiscard]] std::string summary() const;             // one line for people

  struct State;  // src/text/tokenizer_state.h

 private:
  explicit Tokenizer(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

}  // namespace capstan::text
