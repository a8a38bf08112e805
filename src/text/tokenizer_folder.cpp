// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/tokenizer_folder.h"

#include <fmt/format.h>

#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "capstan/base/json.h"
#include "capstan/base/text.h"

namespace capstan::text {
namespace {

// Part of what identifies a result: raised when the trainer would give other merges.
constexpr const char* kTrainerVersion = "byte-level-bpe-1";

constexpr const char* kTokenizer = "tokenizer.json";
constexpr const char* kConfig = "tokenizer_config.json";
constexpr const char* kTraining = "tokenizer_training.json";

bool is_file(const Path& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

std::optional<std::string> read_if_there(const Path& path) {
  if (!is_file(path)) return std::nullopt;
  return read_file(path);
}

void write_or_remove(const Path& path, const std::optional<std::string>& content) {
  if (content) return write_file_atomic(path, *content);
  std::error_code error;
  std::filesystem::remove(path, error);
  if (error) {
    throw EnvError(
        {.module = "text", .what = "removing the old " + path.string(), .got = error.message()});
  }
}

struct FolderContent {
  std::string tokenizer;
  std::optional<std::string> config, training;
};

FolderContent read_folder(const Path& folder) {
  return {read_file(folder / kTokenizer), read_if_there(folder / kConfig),
          read_if_there(folder / kTraining)};
}

void write_folder(const Path& folder, const FolderContent& content) {
  create_directories_durable(folder);
  write_or_remove(folder / kTraining, std::nullopt);  // never beside files it does not describe
  write_or_remove(folder / kConfig, content.config);
  write_file_atomic(folder / kTokenizer, content.tokenizer);
  if (content.training) write_file_atomic(folder / kTraining, *content.training);
}

[[noreturn]] void refuse_to_replace(const Path& folder, const std::string& got) {
  throw ConfigError({.module = "text",
                     .what = "writing the tokenizer " + folder.string(),
                     .got = got,
                     .need = "an empty folder, or one with this very tokenizer",
                     .why = "token files made with the old one would no longer fit",
                     .fix = "Choose another --output, or replace it with --force"});
}

// Corpus and options in one hash: the same digest gives the same tokenizer.
std::string digest_of(const TrainFolderOptions& options, const std::vector<Source>& sources) {
  Hasher hasher;
  hasher.update(fmt::format("{} {} {} {} ", kTrainerVersion, options.trainer.vocab_size,
                            name_of(options.trainer.pattern), options.trainer.min_count));
  for (const std::string& token : options.trainer.special_tokens) {
    hasher.update(fmt::format("{}:{} ", token.size(), token));
  }
  const bool skip = options.documents.bad_lines == BadLine::kSkip;
  hasher.update(
      fmt::format("{}:{} {} ", options.documents.field.size(), options.documents.field, skip));
  hasher.update(content_digest(sources));
  return hasher.hex();
}

std::string training_text(const std::string& digest, const std::string& fingerprint) {
  return fmt::format("{{\n  \"made_from\": \"{}\",\n  \"tokenizer\": \"{}\"\n}}\n", digest,
                     fingerprint);
}

// True when the folder says that it holds exactly this result and the file still is the one it
// means.
bool holds_result(const FolderContent& found, const std::string& digest) {
  return found.training == training_text(digest, xxh3_128_hex(found.tokenizer));
}

}  // namespace

FolderReport train_tokenizer_folder(const TrainFolderOptions& options) {
  SourceCounts counts;
  const std::vector<Source> sources = list_sources(options.sources, &counts);
  const std::string digest = digest_of(options, sources);
  std::optional<FolderContent> found;
  if (is_file(options.output / kTokenizer)) found = read_folder(options.output);
  if (found && holds_result(*found, digest)) {
    return {Tokenizer::load(options.output), true, counts, counts.kept_bytes, 0};
  }
  if (found && found->training && !options.force) {
    refuse_to_replace(options.output,
                      "a tokenizer trained on another corpus or with other options");
  }
  const BpeTrainerResult result = train_bpe(sources, options.documents, options.trainer);
  FolderContent made{tokenizer_json(result), tokenizer_config_json(result), std::nullopt};
  made.training = training_text(digest, xxh3_128_hex(made.tokenizer));
  const bool same = found && found->tokenizer == made.tokenizer && found->config == made.config;
  if (found && !same && !options.force) {
    refuse_to_replace(options.output, "a tokenizer that was not trained here");
  }
  // A text read back is a text that works: what cannot be loaded is never written.
  Tokenizer tokenizer =
      Tokenizer::parse(made.tokenizer, (options.output / kTokenizer).string(), *made.config);
  write_folder(options.output, made);
  return {std::move(tokenizer), same, counts, result.corpus_bytes, result.distinct_pieces};
}

FolderReport import_tokenizer_folder(const Path& input, const Path& output, bool force) {
  Tokenizer tokenizer = Tokenizer::load(input);
  std::error_code error;
  const Path file = std::filesystem::is_directory(input, error) ? input / kTokenizer : input;
  const FolderContent content{read_file(file), read_if_there(file.parent_path() / kConfig),
                              std::nullopt};
  if (is_file(output / kTokenizer)) {
    const FolderContent found = read_folder(output);
    if (found.tokenizer == content.tokenizer && found.config == content.config) {
      return {std::move(tokenizer), true, {}, 0, 0};
    }
    if (!force) {
      const bool same_ids = found.tokenizer == content.tokenizer;
      refuse_to_replace(output, same_ids ? "another tokenizer_config.json" : "another tokenizer");
    }
  }
  write_folder(output, content);
  return {std::move(tokenizer), false, {}, 0, 0};
}

}  // namespace capstan::text
