// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a loaded tokenizer consists of; immutable after loading.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "capstan/base/json.h"
#include "capstan/text/tokenizer.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/normalizer.h"
#include "text/regex.h"
#include "text/scanner.h"

namespace capstan::text {

// One stage of the pre-tokenizer: a scanner, a pattern, or (neither) the prefix space.
struct PieceStep {
  Scan scan = nullptr;
  std::shared_ptr<const Regex> regex;
};

struct Tokenizer::State {
  uint64_t serial = 0;  // distinguishes the caches of the threads
  std::string origin, fingerprint, pattern_name;

  BpeModel model;
  std::vector<std::string> bytes;  // by id
  StringMap<int32_t> ids;          // as written in the file
  std::vector<uint8_t> special;    // by id
  std::vector<int32_t> special_ids;

  std::vector<NormalForm> normal_forms;
  std::vector<PieceStep> steps;
  AddedTokenMatcher raw_tokens, normalized_tokens;
  std::vector<int32_t> prefix, suffix;  // added around a text by the post-processor
  std::optional<int32_t> eos, bos;
};

// Reads the parts of a tokenizer.json into a state; every member throws DataError naming the place.
class TokenizerReader {
 public:
  TokenizerReader(std::string_view origin, Tokenizer::State& state)
      : origin_(origin), state_(state) {}
  void read(const json::Json& root);
  void read_config(const json::Json& config, std::string_view origin);  // tokenizer_config.json

 private:
  using Json = json::Json;
  struct Fault {
    std::string where, got, need, why;
  };
  [[noreturn]] void refuse(const Fault& fault) const;

  // tokenizer_model.cpp
  void read_vocabulary(const Json& model);
  void read_merges(const Json& model);
  void read_model_options(const Json& model);
  void read_added_tokens(const Json& root);
  AddedToken read_added_token(const Json& entry, const std::string& where) const;
  void check_ids() const;
  void fill_bytes(const std::vector<AddedToken>& added);
  void make_matchers(std::vector<AddedToken> added);
  std::pair<std::string, std::string> merge_pair(const Json& merge, const std::string& where) const;
  int32_t token_id(const std::string& token, const std::string& where) const;
  void choose_default_ends();

  // tokenizer_steps.cpp
  void read_normalizer(const Json& part, const std::string& where);
  void read_pre_tokenizer(const Json& part, const std::string& where);
  void read_split(const Json& part, const std::string& where);
  void read_byte_level(const Json& part, const std::string& where);
  void read_digits(const Json& part, const std::string& where);
  void read_post_processor(const Json& part, const std::string& where);
  void read_template(const Json& part, const std::string& where);
  void read_decoder(const Json& part, const std::string& where);
  void add_regex(std::string_view pattern, Regex::Kind kind, const std::string& where);
  std::string kind_of(const Json& part, const std::string& where) const;
  const Json& list_of(const Json& part, const char* key, const std::string& where) const;
  bool flag(const Json& part, const char* key, bool otherwise, const std::string& where) const;
  std::string string_of(const Json& part, const char* key, const std::string& where) const;

  std::string origin_;
  Tokenizer::State& state_;
  std::vector<AddedToken> added_;
  std::vector<uint8_t> seen_;  // ids of the vocabulary and the added tokens
  bool has_byte_level_ = false;
};

}  // namespace capstan::text
