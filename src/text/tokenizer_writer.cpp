// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// tokenizer.json and tokenizer_config.json of a trained tokenizer, byte for byte a function of the
// result.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "capstan/text/bpe_trainer.h"
#include "text/byte_map.h"
#include "text/scanner.h"

namespace capstan::text {
namespace {

using Ordered = nlohmann::ordered_json;

Ordered added_tokens(const BpeTrainerResult& result) {
  Ordered list = Ordered::array();
  for (size_t id = 0; id < result.special_tokens.size(); ++id) {
    list.push_back({{"id", id},
                    {"content", result.special_tokens[id]},
                    {"single_word", false},
                    {"lstrip", false},
                    {"rstrip", false},
                    {"normalized", false},
                    {"special", true}});
  }
  return list;
}

Ordered byte_level(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

Ordered pre_tokenizer(PiecePattern pattern) {
  if (pattern == PiecePattern::kGpt2) return byte_level(true);
  const Ordered split = {{"type", "Split"},
                         {"pattern", {{"Regex", std::string(regex_of(pattern))}}},
                         {"behavior", "Isolated"},
                         {"invert", false}};
  return {{"type", "Sequence"}, {"pretokenizers", Ordered::array({split, byte_level(false)})}};
}

std::string symbols_of(const BpeTrainerResult& result, int32_t id) {
  const std::string& bytes = result.token_bytes[static_cast<size_t>(id)];
  const bool special = static_cast<size_t>(id) < result.special_tokens.size();
  return special ? bytes : bytes_to_symbols(bytes);
}

// One token or merge per line, so that two vocabularies can be compared by diff.
std::string model_text(const BpeTrainerResult& result) {
  std::string out =
      "{\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
      "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n"
      "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n"
      "    \"vocab\": {";
  const auto count = static_cast<int32_t>(result.token_bytes.size());
  for (int32_t id = 0; id < count; ++id) {
    out +=
        fmt::format("{}\n      {}: {}", id ? "," : "", Ordered(symbols_of(result, id)).dump(), id);
  }
  out += "\n    },\n    \"merges\": [";
  bool first = true;
  for (const auto& [left, right] : result.merges) {
    const Ordered pair = symbols_of(result, left) + " " + symbols_of(result, right);
    out += fmt::format("{}\n      {}", first ? "" : ",", pair.dump());
    first = false;
  }
  return out + "\n    ]\n  }";
}

}  // namespace

std::string tokenizer_json(const BpeTrainerResult& result) {
  Ordered post = byte_level(true);
  post["trim_offsets"] = false;
  return fmt::format(
      "{{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n"
      "  \"added_tokens\": {},\n  \"normalizer\": null,\n  \"pre_tokenizer\": {},\n"
      "  \"post_processor\": {},\n  \"decoder\": {},\n  \"model\": {}\n}}\n",
      added_tokens(result).dump(), pre_tokenizer(result.pattern).dump(), post.dump(),
      byte_level(true).dump(), model_text(result));
}

std::string tokenizer_config_json(const BpeTrainerResult& result) {
  Ordered config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                    {"add_bos_token", false},
                    {"clean_up_tokenization_spaces", false}};
  if (!result.special_tokens.empty()) {
    config["bos_token"] = result.special_tokens.front();
    config["eos_token"] = result.special_tokens.front();
  }
  return config.dump(2) + "\n";
}

}  // namespace capstan::text
