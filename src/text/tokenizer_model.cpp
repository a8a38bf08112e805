// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Vocabulary, merges and added tokens of tokenizer.json.
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "text/byte_map.h"
#include "text/tokenizer_state.h"

namespace capstan::text {
namespace {

constexpr int64_t kMaxVocabulary = 1 << 24;

const json::Json kNull;

const json::Json& part_of(const json::Json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() ? kNull : *found;
}

std::string kind_name(const json::Json& value) { return value.type_name(); }

}  // namespace

void TokenizerReader::refuse(const Fault& fault) const {
  throw DataError({.module = "text",
                   .what = fmt::format("reading {} of {}", fault.where, origin_),
                   .got = fault.got,
                   .need = fault.need,
                   .why = fault.why});
}

bool TokenizerReader::flag(const Json& part, const char* key, bool otherwise,
                           const std::string& where) const {
  const Json& value = part_of(part, key);
  if (value.is_null()) return otherwise;
  if (!value.is_boolean()) refuse({where + "." + key, kind_name(value), "true or false", ""});
  return value.get<bool>();
}

std::string TokenizerReader::string_of(const Json& part, const char* key,
                                       const std::string& where) const {
  const Json& value = part_of(part, key);
  if (!value.is_string()) refuse({where + "." + key, kind_name(value), "a string", ""});
  return value.get<std::string>();
}

const json::Json& TokenizerReader::list_of(const Json& part, const char* key,
                                           const std::string& where) const {
  const Json& value = part_of(part, key);
  if (!value.is_array()) refuse({where + "." + key, kind_name(value), "an array", ""});
  return value;
}

int32_t TokenizerReader::token_id(const std::string& token, const std::string& where) const {
  const auto found = state_.ids.find(token);
  if (found == state_.ids.end()) {
    refuse({where, quote(token), "a token of the vocabulary", "it is absent there"});
  }
  return found->second;
}

void TokenizerReader::read(const Json& root) {
  if (!root.is_object()) refuse({"the file", kind_name(root), "an object", ""});
  const Json& model = part_of(root, "model");
  if (!model.is_object()) refuse({"model", kind_name(model), "an object", ""});
  const Json& type = part_of(model, "type");
  if (!type.is_null() && type != Json("BPE")) {
    refuse({"model.type", type.is_string() ? quote(type.get<std::string>()) : kind_name(type),
            "'BPE'", "this build reads byte-level BPE"});
  }
  read_vocabulary(model);
  read_added_tokens(root);
  check_ids();
  fill_bytes(added_);
  read_merges(model);
  read_normalizer(part_of(root, "normalizer"), "normalizer");
  read_pre_tokenizer(part_of(root, "pre_tokenizer"), "pre_tokenizer");
  if (!has_byte_level_) {
    refuse({"pre_tokenizer", "none of kind 'ByteLevel'", "'ByteLevel' as the last one",
            "this build reads byte-level BPE"});
  }
  read_model_options(model);
  read_post_processor(part_of(root, "post_processor"), "post_processor");
  read_decoder(part_of(root, "decoder"), "decoder");
  for (const char* ignored : {"truncation", "padding"}) {
    if (!part_of(root, ignored).is_null()) {
      refuse({ignored, "a rule", "null", "text is encoded whole; remove it from the file"});
    }
  }
  make_matchers(std::move(added_));
  choose_default_ends();
}

void TokenizerReader::read_vocabulary(const Json& model) {
  const Json& vocabulary = part_of(model, "vocab");
  if (!vocabulary.is_object()) refuse({"model.vocab", kind_name(vocabulary), "an object", ""});
  if (vocabulary.empty()) refuse({"model.vocab", "no tokens", "at least one", ""});
  state_.ids.reserve(vocabulary.size() * 2);
  for (const auto& [token, id] : vocabulary.items()) {
    const bool ok = id.is_number_unsigned() && id.get<uint64_t>() < kMaxVocabulary;
    if (!ok) {
      refuse({"model.vocab[" + quote(token) + "]", id.dump().substr(0, 40),
              fmt::format("an id in [0, {}]", kMaxVocabulary - 1), ""});
    }
    state_.ids.emplace(token, id.get<int32_t>());
  }
}

AddedToken TokenizerReader::read_added_token(const Json& entry, const std::string& where) const {
  if (!entry.is_object()) refuse({where, kind_name(entry), "an object", ""});
  const Json& id = part_of(entry, "id");
  if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMaxVocabulary) {
    refuse({where + ".id", id.dump().substr(0, 40),
            fmt::format("an id in [0, {}]", kMaxVocabulary - 1), ""});
  }
  AddedToken token{.id = id.get<int32_t>(), .content = string_of(entry, "content", where)};
  if (token.content.empty()) refuse({where + ".content", "an empty string", "text", ""});
  token.special = flag(entry, "special", false, where);
  token.single_word = flag(entry, "single_word", false, where);
  token.lstrip = flag(entry, "lstrip", false, where);
  token.rstrip = flag(entry, "rstrip", false, where);
  token.normalized = flag(entry, "normalized", !token.special, where);
  return token;
}

void TokenizerReader::read_added_tokens(const Json& root) {
  const Json& list = part_of(root, "added_tokens");
  if (list.is_null()) return;
  if (!list.is_array()) refuse({"added_tokens", kind_name(list), "an array", ""});
  StringMap<size_t> places;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string where = fmt::format("added_tokens[{}]", i);
    AddedToken token = read_added_token(list[i], where);
    const auto [place, is_new] = places.emplace(token.content, i);
    if (!is_new) {
      refuse({where, quote(token.content), "each token once",
              fmt::format("added_tokens[{}] is the same", place->second)});
    }
    const auto [known, inserted] = state_.ids.emplace(token.content, token.id);
    if (!inserted && known->second != token.id) {
      refuse({where + ".id", std::to_string(token.id), std::to_string(known->second),
              quote(token.content) + " has that id in the vocabulary"});
    }
    added_.push_back(std::move(token));
  }
}

// n distinct tokens with n distinct ids below n: no gap and no id twice.
void TokenizerReader::check_ids() const {
  const auto count = static_cast<int64_t>(state_.ids.size());
  std::vector<const std::string*> owner(state_.ids.size(), nullptr);
  const std::string* outside = nullptr;
  for (const auto& [token, id] : state_.ids) {
    if (id >= count) {
      if (!outside || id > state_.ids.find(*outside)->second) outside = &token;
      continue;
    }
    const std::string*& holder = owner[static_cast<size_t>(id)];
    if (holder) {
      const auto [low, high] = std::minmax(*holder, token);
      refuse({"model.vocab", fmt::format("id {} for {} and {}", id, quote(low), quote(high)),
              "one token per id", ""});
    }
    holder = &token;
  }
  if (!outside) return;
  const auto gap = std::find(owner.begin(), owner.end(), nullptr) - owner.begin();
  refuse({"model.vocab",
          fmt::format("id {} for {} among {} tokens", state_.ids.find(*outside)->second,
                      quote(*outside), count),
          "ids without gaps", fmt::format("no token has id {}", gap)});
}

// Tokens written in the byte alphabet stand for those bytes; other tokens, and what was added to
// the vocabulary for use in raw text, stand for themselves.
void TokenizerReader::fill_bytes(const std::vector<AddedToken>& added) {
  state_.bytes.resize(state_.ids.size());
  state_.special.assign(state_.ids.size(), 0);
  for (const auto& [token, id] : state_.ids) {
    std::optional<std::string> bytes = symbols_to_bytes(token);
    state_.bytes[static_cast<size_t>(id)] = bytes ? std::move(*bytes) : token;
  }
  for (const AddedToken& token : added) {
    const auto id = static_cast<size_t>(token.id);
    state_.bytes[id] = token.content;
    state_.special[id] = token.special ? 1 : 0;
    if (token.special) state_.special_ids.push_back(token.id);
  }
  std::sort(state_.special_ids.begin(), state_.special_ids.end());
  for (size_t b = 0; b < 256; ++b) {
    const auto found = state_.ids.find(bytes_to_symbols(std::string(1, static_cast<char>(b))));
    state_.model.byte_ids[b] = found == state_.ids.end() ? kNoToken : found->second;
  }
}

std::pair<std::string, std::string> TokenizerReader::merge_pair(const Json& merge,
                                                                const std::string& where) const {
  if (merge.is_array()) {
    if (merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string()) {
      refuse({where, merge.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 80),
              "two strings", ""});
    }
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  }
  if (!merge.is_string()) refuse({where, kind_name(merge), "a string or a pair of strings", ""});
  const auto text = merge.get<std::string>();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
    refuse({where, quote(text), "two tokens with one space between them", ""});
  }
  return {text.substr(0, space), text.substr(space + 1)};
}

void TokenizerReader::read_merges(const Json& model) {
  const Json& merges = list_of(model, "merges", "model");
  state_.model.merges = MergeTable(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto where = [i] { return fmt::format("model.merges[{}]", i); };
    const auto [left, right] = merge_pair(merges[i], where());
    const auto id = [&](const std::string& token) {
      const auto found = state_.ids.find(token);
      return found == state_.ids.end() ? token_id(token, where()) : found->second;
    };
    const int32_t left_id = id(left), right_id = id(right);
    state_.model.merges.set(left_id, right_id, static_cast<int32_t>(i), id(left + right));
  }
}

void TokenizerReader::read_model_options(const Json& model) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& value = part_of(model, key);
    if (!value.is_null() && value != Json("")) {
      refuse({std::string("model.") + key, kind_name(value), "null or an empty string",
              "byte-level BPE has no such mark"});
    }
  }
  const Json& dropout = part_of(model, "dropout");
  if (!dropout.is_null() && !(dropout.is_number() && dropout.get<double>() == 0.0)) {
    refuse({"model.dropout", dropout.dump().substr(0, 40), "null",
            "the same text must always give the same ids"});
  }
  const auto& byte_ids = state_.model.byte_ids;
  const auto absent = std::find(byte_ids.begin(), byte_ids.end(), kNoToken);
  if (flag(model, "byte_fallback", false, "model") && absent != byte_ids.end()) {
    refuse({"model.byte_fallback",
            fmt::format("true without a token for byte 0x{:02x}", absent - byte_ids.begin()),
            "all 256 byte symbols in the vocabulary", "byte-level BPE then never falls back"});
  }
  const Json& unknown = part_of(model, "unk_token");
  if (!unknown.is_null()) {
    state_.model.unknown_id = token_id(string_of(model, "unk_token", "model"), "model.unk_token");
  }
  state_.model.fuse_unknown = flag(model, "fuse_unk", false, "model");
  state_.model.ignore_merges = flag(model, "ignore_merges", false, "model");
  if (!state_.model.ignore_merges) return;
  for (const auto& [token, id] : part_of(model, "vocab").items()) {
    if (const auto bytes = symbols_to_bytes(token)) {
      state_.model.whole_pieces.emplace(*bytes, id.get<int32_t>());
    }
  }
}

void TokenizerReader::make_matchers(std::vector<AddedToken> added) {
  std::vector<AddedToken> raw, normalized;
  std::vector<std::string> raw_patterns, normalized_patterns;
  for (AddedToken& token : added) {
    std::string pattern = token.content;
    if (token.normalized) {
      for (const NormalForm form : state_.normal_forms) pattern = normalize(pattern, form);
    }
    (token.normalized ? normalized_patterns : raw_patterns).push_back(std::move(pattern));
    (token.normalized ? normalized : raw).push_back(std::move(token));
  }
  state_.raw_tokens = AddedTokenMatcher(std::move(raw), raw_patterns);
  state_.normalized_tokens = AddedTokenMatcher(std::move(normalized), normalized_patterns);
}

// Without a tokenizer_config.json the usual names are looked up among the special tokens.
void TokenizerReader::choose_default_ends() {
  const auto first_special = [this](std::initializer_list<const char*> names) {
    for (const char* name : names) {
      const auto found = state_.ids.find(std::string_view(name));
      if (found != state_.ids.end() && state_.special[static_cast<size_t>(found->second)]) {
        return std::optional<int32_t>(found->second);
      }
    }
    return std::optional<int32_t>();
  };
  state_.eos = first_special({"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"});
  state_.bos = first_special({"<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>"});
  if (!state_.prefix.empty()) state_.bos = state_.prefix.front();
}

void TokenizerReader::read_config(const Json& config, std::string_view origin) {
  origin_ = origin;
  if (!config.is_object()) refuse({"the file", kind_name(config), "an object", ""});
  const auto named = [&](const char* key, std::optional<int32_t>& id) {
    const Json& value = part_of(config, key);
    if (config.find(key) == config.end()) return;
    if (value.is_null()) return id.reset();
    const Json& name = value.is_object() ? part_of(value, "content") : value;
    if (!name.is_string()) refuse({key, kind_name(name), "the text of a token", ""});
    id = token_id(name.get<std::string>(), key);
  };
  named("eos_token", state_.eos);
  named("bos_token", state_.bos);
}

}  // namespace capstan::text
