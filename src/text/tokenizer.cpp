// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/tokenizer.h"

#include <fmt/format.h>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "text/piece_cache.h"
#include "text/tokenizer_state.h"
#include "text/unicode.h"

namespace capstan::text {
namespace {

// The cache of this thread for a tokenizer; the two used last are kept.
PieceCache& thread_cache(uint64_t serial) {
  struct Held {
    uint64_t serial = 0;
    std::unique_ptr<PieceCache> cache;
  };
  thread_local Held recent, older;
  if (recent.serial == serial) return *recent.cache;
  std::swap(recent, older);
  if (recent.serial != serial) recent = {serial, std::make_unique<PieceCache>()};
  return *recent.cache;
}

// One call of encode().
class Encoder {
 public:
  Encoder(const Tokenizer::State& state, bool parse_special, std::vector<int32_t>& out)
      : state_(state),
        cache_(thread_cache(state.serial)),
        parse_special_(parse_special),
        out_(out) {}

  void encode(std::string_view text) {
    if (state_.raw_tokens.empty()) return encode_bytes(text);
    for (const auto& part : state_.raw_tokens.split(text, parse_special_)) {
      part.id == kNoToken ? encode_bytes(part.text) : out_.push_back(part.id);
    }
  }

 private:
  // Stretches of valid UTF-8 go through the pipeline; every other byte is a piece of its own.
  void encode_bytes(std::string_view text) {
    while (!text.empty()) {
      const size_t valid = valid_prefix(text);
      if (valid > 0) encode_valid(text.substr(0, valid));
      if (valid == text.size()) return;
      emit(text.substr(valid, 1));
      text.remove_prefix(valid + 1);
    }
  }

  void encode_valid(std::string_view text) {
    std::string normal;
    for (const NormalForm form : state_.normal_forms) {
      if (is_surely_normal(text, form)) continue;
      normal = normalize(text, form);
      text = normal;
    }
    if (state_.normalized_tokens.empty()) return run_steps(0, text);
    for (const auto& part : state_.normalized_tokens.split(text, parse_special_)) {
      part.id == kNoToken ? run_steps(0, part.text) : out_.push_back(part.id);
    }
  }

  void run_steps(size_t index, std::string_view text) {
    if (index == state_.steps.size()) return emit(text);
    const PieceStep& step = state_.steps[index];
    if (step.scan) {
      const bool last = index + 1 == state_.steps.size();
      while (!text.empty()) {
        const size_t length = step.scan(text);
        const std::string_view piece = text.substr(0, length);
        last ? emit(piece) : run_steps(index + 1, piece);
        text.remove_prefix(length);
      }
    } else if (step.regex) {
      step.regex->split(text, [&](std::string_view piece) { run_steps(index + 1, piece); });
    } else if (!text.starts_with(' ')) {
      run_steps(index + 1, " " + std::string(text));
    } else {
      run_steps(index + 1, text);
    }
  }

  void emit(std::string_view piece) {
    if (piece.empty()) return;
    const PieceCache::Key key(piece);
    if (key.length > 0 && cache_.append(key, out_)) return;
    const size_t before = out_.size();
    const int absent = encode_piece(state_.model, piece, out_);
    if (absent >= 0) refuse_byte(absent);
    if (key.length > 0) cache_.put(key, std::span(out_).subspan(before));
  }

  [[noreturn]] void refuse_byte(int byte) const {
    throw DataError({.module = "text",
                     .what = "encoding text with " + state_.origin,
                     .got = fmt::format("byte 0x{:02x}", byte),
                     .need = "a byte of the vocabulary",
                     .why = "the tokenizer has neither this byte nor an unknown token",
                     .fix = "Use a tokenizer with all 256 byte symbols"});
  }

  const Tokenizer::State& state_;
  PieceCache& cache_;
  bool parse_special_;
  std::vector<int32_t>& out_;
};

}  // namespace

Tokenizer Tokenizer::load(const Path& path) {
  std::error_code error;
  const bool is_folder = std::filesystem::is_directory(path, error);
  const Path file = is_folder ? path / "tokenizer.json" : path;
  if (!std::filesystem::is_regular_file(file, error)) {
    throw ConfigError({.module = "text",
                       .what = "loading the tokenizer " + path.string(),
                       .got = is_folder ? "a folder without tokenizer.json" : "no such file",
                       .need = "a folder with tokenizer.json, or such a file",
                       .fix = "Make one with capstan data tokenizer train or import"});
  }
  const Path config = file.parent_path() / "tokenizer_config.json";
  const std::string text = read_file(file);
  const bool has_config = std::filesystem::is_regular_file(config, error);
  return parse(text, file.string(), has_config ? read_file(config) : std::string());
}

Tokenizer Tokenizer::parse(std::string_view json, std::string_view origin,
                           std::string_view config) {
  static std::atomic<uint64_t> next_serial{1};
  auto state = std::make_shared<State>();
  state->serial = next_serial.fetch_add(1);
  state->origin = origin;
  state->fingerprint = xxh3_128_hex(json);
  TokenizerReader reader(origin, *state);
  reader.read(json::parse(json, origin));
  if (!config.empty()) {
    const std::string place = (Path(origin).parent_path() / "tokenizer_config.json").string();
    reader.read_config(json::parse(config, place), place);
  }
  return Tokenizer(std::move(state));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + 8);
  if (options.add_special) ids = state_->prefix;
  Encoder(*state_, options.parse_special, ids).encode(text);
  if (options.add_special) ids.insert(ids.end(), state_->suffix.begin(), state_->suffix.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, const DecodeOptions& options) const {
  std::string text;
  text.reserve(ids.size() * 4);
  for (const int32_t id : ids) {
    const std::string_view bytes = token_bytes(id);
    if (!(options.skip_special && state_->special[static_cast<size_t>(id)])) text += bytes;
  }
  return text;
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(state_->bytes.size()); }

std::string_view Tokenizer::token_bytes(int32_t id) const {
  if (id < 0 || id >= vocab_size()) {
    throw DataError({.module = "text",
                     .what = "decoding tokens with " + state_->origin,
                     .got = "id " + std::to_string(id),
                     .need = fmt::format("an id in [0, {}]", vocab_size() - 1),
                     .why = "the tokens were made by another tokenizer"});
  }
  return state_->bytes[static_cast<size_t>(id)];
}

std::optional<int32_t> Tokenizer::id_of(std::string_view token) const {
  const auto found = state_->ids.find(token);
  if (found == state_->ids.end()) return std::nullopt;
  return found->second;
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && state_->special[static_cast<size_t>(id)] != 0;
}

std::span<const int32_t> Tokenizer::special_ids() const { return state_->special_ids; }
std::optional<int32_t> Tokenizer::eos_id() const { return state_->eos; }
std::optional<int32_t> Tokenizer::bos_id() const { return state_->bos; }
const std::string& Tokenizer::fingerprint() const { return state_->fingerprint; }

std::string Tokenizer::summary() const {
  const auto name = [this](const std::optional<int32_t>& id) {
    return id ? fmt::format("{} ({})", token_bytes(*id), *id) : std::string("none");
  };
  return fmt::format("byte-level BPE, {} tokens, pieces: {}, eos {}, bos {}, fingerprint {}",
                     format_count(vocab_size()),
                     state_->pattern_name.empty() ? "whole text" : state_->pattern_name,
                     name(state_->eos), name(state_->bos), state_->fingerprint);
}

}  // namespace capstan::text
