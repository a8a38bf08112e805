// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Normalizer, pre-tokenizer, post-processor and decoder of tokenizer.json.
#include <fmt/format.h>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "text/tokenizer_state.h"

namespace capstan::text {

std::string TokenizerReader::kind_of(const Json& part, const std::string& where) const {
  if (!part.is_object()) refuse({where, part.type_name(), "an object with a type", ""});
  return string_of(part, "type", where);
}

void TokenizerReader::read_normalizer(const Json& part, const std::string& where) {
  if (part.is_null()) return;
  const std::string kind = kind_of(part, where);
  static const std::pair<const char*, NormalForm> kForms[] = {{"NFC", NormalForm::kNfc},
                                                              {"NFD", NormalForm::kNfd},
                                                              {"NFKC", NormalForm::kNfkc},
                                                              {"NFKD", NormalForm::kNfkd}};
  for (const auto& [name, form] : kForms) {
    if (kind == name) return state_.normal_forms.push_back(form);
  }
  if (kind != "Sequence") {
    refuse({where + ".type", quote(kind), "one of NFC, NFD, NFKC, NFKD, Sequence",
            "this build has no other normalizer"});
  }
  const Json& list = list_of(part, "normalizers", where);
  for (size_t i = 0; i < list.size(); ++i) {
    read_normalizer(list[i], fmt::format("{}.normalizers[{}]", where, i));
  }
}

void TokenizerReader::read_pre_tokenizer(const Json& part, const std::string& where) {
  if (part.is_null()) return;
  const std::string kind = kind_of(part, where);
  if (has_byte_level_) {
    refuse({where + ".type", quote(kind) + " after 'ByteLevel'", "'ByteLevel' as the last one",
            "text is in the byte alphabet from there on"});
  }
  if (kind == "Split") return read_split(part, where);
  if (kind == "ByteLevel") return read_byte_level(part, where);
  if (kind == "Digits") return read_digits(part, where);
  if (kind != "Sequence") {
    refuse({where + ".type", quote(kind), "one of Split, ByteLevel, Digits, Sequence",
            "this build has no other pre-tokenizer"});
  }
  const Json& list = list_of(part, "pretokenizers", where);
  for (size_t i = 0; i < list.size(); ++i) {
    read_pre_tokenizer(list[i], fmt::format("{}.pretokenizers[{}]", where, i));
  }
}

void TokenizerReader::add_regex(std::string_view pattern, Regex::Kind kind,
                                const std::string& where) {
  if (kind == Regex::Kind::kPattern) {
    if (const auto known = known_pattern(pattern)) {
      state_.steps.push_back({.scan = scanner_of(*known)});
      state_.pattern_name = name_of(*known);
      return;
    }
  }
  state_.steps.push_back(
      {.regex = std::make_shared<Regex>(pattern, kind, where + " of " + origin_)});
  state_.pattern_name = "own pattern";
}

void TokenizerReader::read_split(const Json& part, const std::string& where) {
  const std::string behavior = string_of(part, "behavior", where);
  if (behavior != "Isolated") {
    refuse({where + ".behavior", quote(behavior), "'Isolated'", "the others lose or move text"});
  }
  flag(part, "invert", false, where);  // makes no difference to isolated pieces
  const auto pattern = part.find("pattern");
  if (pattern == part.end() || !pattern->is_object() || pattern->size() != 1) {
    refuse({where + ".pattern", pattern == part.end() ? "nothing" : pattern->type_name(),
            "an object with Regex or String", ""});
  }
  const std::string form = pattern->begin().key();
  if (form != "Regex" && form != "String") {
    refuse({where + ".pattern", quote(form), "Regex or String", ""});
  }
  const auto kind = form == "Regex" ? Regex::Kind::kPattern : Regex::Kind::kLiteral;
  add_regex(string_of(*pattern, form.c_str(), where + ".pattern"), kind, where + ".pattern");
}

void TokenizerReader::read_byte_level(const Json& part, const std::string& where) {
  has_byte_level_ = true;
  if (flag(part, "add_prefix_space", true, where)) state_.steps.push_back({});
  if (flag(part, "use_regex", true, where)) {
    add_regex(regex_of(PiecePattern::kGpt2), Regex::Kind::kPattern, where);
  }
}

void TokenizerReader::read_digits(const Json& part, const std::string& where) {
  const bool individual = flag(part, "individual_digits", false, where);
  add_regex(individual ? "\\p{N}" : "\\p{N}+", Regex::Kind::kPattern, where);
}

void TokenizerReader::read_post_processor(const Json& part, const std::string& where) {
  if (part.is_null()) return;
  const std::string kind = kind_of(part, where);
  if (kind == "ByteLevel") return;  // changes offsets only
  if (kind == "TemplateProcessing") return read_template(part, where);
  if (kind != "Sequence") {
    refuse({where + ".type", quote(kind), "one of ByteLevel, TemplateProcessing, Sequence",
            "this build has no other post-processor"});
  }
  const Json& list = list_of(part, "processors", where);
  for (size_t i = 0; i < list.size(); ++i) {
    read_post_processor(list[i], fmt::format("{}.processors[{}]", where, i));
  }
}

// `single`: special tokens before and after the one sequence A.
void TokenizerReader::read_template(const Json& part, const std::string& where) {
  if (!state_.prefix.empty() || !state_.suffix.empty()) {
    refuse({where, "a second template", "one", ""});
  }
  const Json& list = list_of(part, "single", where);
  const auto specials = part.find("special_tokens");
  bool after = false;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string place = fmt::format("{}.single[{}]", where, i);
    const Json& item = list[i];
    if (!item.is_object() || item.size() != 1 || !item.begin()->is_object()) {
      refuse({place, item.type_name(), "SpecialToken or Sequence", ""});
    }
    const std::string name = string_of(*item.begin(), "id", place);
    if (item.begin().key() == "Sequence" && name == "A" && !after) {
      after = true;
      continue;
    }
    if (item.begin().key() != "SpecialToken") {
      refuse({place, quote(item.begin().key()) + " " + quote(name),
              "SpecialToken or Sequence A once", ""});
    }
    if (specials == part.end() || !specials->is_object() || !specials->contains(name)) {
      refuse({place, quote(name), "a name listed in special_tokens", ""});
    }
    const std::string entry = where + ".special_tokens[" + quote(name) + "]";
    if (!specials->at(name).is_object()) refuse({entry, "no object", "an object with ids", ""});
    for (const Json& id : list_of(specials->at(name), "ids", entry)) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() >= state_.bytes.size()) {
        refuse({entry, id.dump().substr(0, 40), "an id of the vocabulary", ""});
      }
      (after ? state_.suffix : state_.prefix).push_back(id.get<int32_t>());
    }
  }
  if (!after) refuse({where + ".single", "no Sequence A", "the text itself", ""});
}

void TokenizerReader::read_decoder(const Json& part, const std::string& where) {
  if (part.is_null()) {
    refuse({where, "null", "'ByteLevel'", "tokens are in the byte alphabet"});
  }
  const std::string kind = kind_of(part, where);
  if (kind == "ByteLevel") return;
  if (kind == "Sequence") {
    const Json& list = list_of(part, "decoders", where);
    if (list.size() == 1) return read_decoder(list[0], where + ".decoders[0]");
    refuse({where, fmt::format("a sequence of {}", list.size()), "'ByteLevel' alone", ""});
  }
  refuse({where + ".type", quote(kind), "'ByteLevel'", "this build has no other decoder"});
}

}  // namespace capstan::text
