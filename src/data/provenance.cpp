// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/provenance.h"

#include <fmt/format.h>

#include <cstdint>
#include <filesystem>
#include <fstream>

#include "capstan/base/error.h"
#include "capstan/base/json.h"

namespace capstan::data {
namespace {

constexpr const char* kFormat = "capstan-token-files";
constexpr int64_t kMaxBytes = int64_t{16} << 20;
constexpr int64_t kMost = INT64_MAX;

// A user's own PREFIX.json may lie there; ours names itself in its first lines.
bool is_ours(const Path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string start(4096, '\0');
  file.read(start.data(), static_cast<std::streamsize>(start.size()));
  start.resize(static_cast<size_t>(file.gcount()));
  return start.find(kFormat) != std::string::npos;
}

std::vector<std::string> get_strings(const json::Json& object, const char* key,
                                     const std::string& origin) {
  const json::Json& list = json::field(object, key, origin);
  std::vector<std::string> values;
  for (const json::Json& item : list) {
    if (!list.is_array() || !item.is_string()) {
      throw DataError(ErrorText{.module = "data",
                                .what = fmt::format("reading {}: field {}", origin, key),
                                .got = "other values",
                                .need = "a list of strings"});
    }
    values.push_back(item.get<std::string>());
  }
  return values;
}

PairSummary parse_pair(const json::Json& object, const std::string& origin) {
  PairSummary pair;
  pair.documents = json::get_int(object, "documents", 0, kMost, origin);
  pair.tokens = json::get_int(object, "tokens", 0, kMost, origin);
  pair.bin_bytes = json::get_int(object, "bin_bytes", 0, kMost, origin);
  pair.idx_bytes = json::get_int(object, "idx_bytes", 0, kMost, origin);
  pair.bin_xxh3 = json::get_string(object, "bin_xxh3", origin);
  pair.idx_xxh3 = json::get_string(object, "idx_xxh3", origin);
  return pair;
}

Provenance parse_provenance(const json::Json& object, const std::string& origin) {
  Provenance p;
  p.version = json::get_int(object, "version", 1, kProvenanceVersion, origin);
  p.tokenizer_fingerprint = json::get_string(object, "tokenizer_fingerprint", origin);
  p.vocab_size = json::get_int(object, "vocab_size", 1, kMost, origin);
  p.eos_id = json::get_int(object, "eos_id", 0, p.vocab_size - 1, origin);
  p.split = json::get_string(object, "split", origin);
  p.validation_fraction = json::get_double(object, "validation_fraction", origin);
  p.field = json::get_string(object, "field", origin);
  p.bad_lines = json::get_string(object, "bad_lines", origin);
  p.include = get_strings(object, "include", origin);
  p.exclude = get_strings(object, "exclude", origin);
  p.max_file_bytes = json::get_int(object, "max_file_bytes", 0, kMost, origin);
  p.deduplicate = json::get_bool(object, "deduplicate", origin);
  p.sources_xxh3 = json::get_string(object, "sources_xxh3", origin);
  p.source_files = json::get_int(object, "source_files", 0, kMost, origin);
  p.left_out_binary = json::get_int(object, "left_out_binary", 0, kMost, origin);
  p.left_out_duplicates = json::get_int(object, "left_out_duplicates", 0, kMost, origin);
  p.left_out_large = json::get_int(object, "left_out_large", 0, kMost, origin);
  p.left_out_empty = json::get_int(object, "left_out_empty", 0, kMost, origin);
  p.bad_line_count = json::get_int(object, "bad_line_count", 0, kMost, origin);
  p.text_bytes = json::get_int(object, "text_bytes", 0, kMost, origin);
  p.pair = parse_pair(object, origin);
  return p;
}

}  // namespace

std::string to_json(const Provenance& p) {
  nlohmann::ordered_json object;
  object["format"] = kFormat;
  object["version"] = p.version;
  object["split"] = p.split;
  object["documents"] = p.pair.documents;
  object["tokens"] = p.pair.tokens;
  object["text_bytes"] = p.text_bytes;
  object["tokenizer_fingerprint"] = p.tokenizer_fingerprint;
  object["vocab_size"] = p.vocab_size;
  object["eos_id"] = p.eos_id;
  object["bin_bytes"] = p.pair.bin_bytes;
  object["bin_xxh3"] = p.pair.bin_xxh3;
  object["idx_bytes"] = p.pair.idx_bytes;
  object["idx_xxh3"] = p.pair.idx_xxh3;
  object["sources_xxh3"] = p.sources_xxh3;
  object["source_files"] = p.source_files;
  object["left_out_binary"] = p.left_out_binary;
  object["left_out_duplicates"] = p.left_out_duplicates;
  object["left_out_large"] = p.left_out_large;
  object["left_out_empty"] = p.left_out_empty;
  object["bad_line_count"] = p.bad_line_count;
  object["validation_fraction"] = p.validation_fraction;
  object["field"] = p.field;
  object["bad_lines"] = p.bad_lines;
  object["include"] = p.include;
  object["exclude"] = p.exclude;
  object["max_file_bytes"] = p.max_file_bytes;
  object["deduplicate"] = p.deduplicate;
  // A pattern from the command line may be no valid UTF-8; it must not cost the whole run at its
  // end.
  return object.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

std::optional<Provenance> read_provenance(const Path& prefix) {
  const Path path = provenance_path(prefix);
  if (!std::filesystem::is_regular_file(path) || !is_ours(path)) return std::nullopt;
  const std::string origin = path.string();
  return parse_provenance(json::parse(read_file(path, kMaxBytes), origin), origin);
}

std::optional<Provenance> read_provenance(const TokenFile& file) {
  auto provenance = read_provenance(file.prefix());
  if (!provenance) return std::nullopt;
  const PairSummary& pair = provenance->pair;
  if (pair.documents != file.documents() || pair.tokens != file.tokens()) {
    throw DataError(ErrorText{
        .module = "data",
        .what = fmt::format("reading {}", provenance_path(file.prefix()).string()),
        .got = fmt::format("{} documents with {} tokens", pair.documents, pair.tokens),
        .need =
            fmt::format("{} and {}, as the .idx beside it says", file.documents(), file.tokens()),
        .why = "the three files were not made together",
        .fix = "Copy all three again or rebuild them with `capstan data prepare`"});
  }
  return provenance;
}

bool is_same_source(const Provenance& a, const Provenance& b) {
  return a.version == b.version && a.tokenizer_fingerprint == b.tokenizer_fingerprint &&
         a.vocab_size == b.vocab_size && a.eos_id == b.eos_id && a.split == b.split &&
         a.validation_fraction == b.validation_fraction && a.field == b.field &&
         a.bad_lines == b.bad_lines && a.sources_xxh3 == b.sources_xxh3;
}

}  // namespace capstan::data
