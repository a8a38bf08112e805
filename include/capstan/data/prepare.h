// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Text to token files: `capstan data prepare`. Files, folders and JSONL are read as a stream,
// tokenized by several workers and written in source order, so memory is bounded and the bytes
// never depend on the workers.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "capstan/data/provenance.h"

namespace capstan::data {

struct PrepareOptions {
  std::vector<std::string> inputs;            // files, folders
  std::vector<std::string> include, exclude;  // globs over relative paths
  int64_t max_file_bytes = 0;                 // larger files are left out and counted; 0 = no limit
  bool deduplicate = false;                   // exact duplicates of whole files
  std::string tokenizer;                      // folder with tokenizer.json
  std::string output;                         // prefix
  std::optional<std::string> validation_output;
  double validation_fraction =
      0;                        // of the documents, by hash of their key; needs validation_output
  std::string field = "text";   // key of the text in JSONL
  bool skip_bad_lines = false;  // of JSONL: leave them out and count them instead of stopping
  int workers = 0;              // 0 = processors of this process
  bool force = false;           // replace pairs made from something else
};

struct PrepareReport {
  bool up_to_date = false;  // everything was there already; nothing was written
  Provenance train;         // "all" without a validation split
  std::optional<Provenance> validation;
  std::string left_out;  // "3 binary, 12 duplicates", empty when nothing was
  std::string first_bad_line;
  double seconds = 0;
};

// True when a document goes to the validation split: xxh3_64(key) < fraction x 2^64. The key is the
// relative path of a file, or path:line of a JSONL record, so adding or removing other documents
// moves none.
[[nodiscard]] bool is_validation_document(std::string_view key, double fraction);

// Throws ConfigError for options, DataError for unusable text, EnvError for disk and files.
[[nodiscard]] PrepareReport prepare(const PrepareOptions& options);

}  // namespace capstan::data
