// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "capstan/base/bytes.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/text/tokenizer_folder.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct TrainOptions {
  text::TrainFolderOptions folder;
  std::string max_file_size, pattern = "llama3";
  bool skip_bad_lines = false;
};

struct ImportOptions {
  Path input, output;
  bool force = false;
};

// One line on a terminal, rewritten in place and removed at the end; nothing anywhere else.
class ProgressLine {
 public:
  ProgressLine() : is_on_(::isatty(STDERR_FILENO) == 1) {}
  ~ProgressLine() { clear(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void show(std::string_view phase, int64_t done, int64_t total) {
    const int64_t now = monotonic_ns();
    if (!is_on_ || now - last_ns_ < 100'000'000) return;
    last_ns_ = now;
    if (phase == "count") {
      fmt::print(stderr, "\r\x1b[Kcounting pieces: {}", format_bytes(done));
    } else {
      fmt::print(stderr, "\r\x1b[Kmerging: {} of {}", format_count(done), format_count(total));
    }
    std::fflush(stderr);
  }
  void clear() {
    if (is_on_ && last_ns_ > 0) fmt::print(stderr, "\r\x1b[K");
    last_ns_ = 0;
  }

 private:
  bool is_on_;
  int64_t last_ns_ = 0;
};

void print_tokenizer(const Path& output, const text::FolderReport& report) {
  fmt::print("tokenizer   {}\n            {}\n", output.string(), report.tokenizer.summary());
}

void run_train(TrainOptions& options) {
  text::TrainFolderOptions& folder = options.folder;
  folder.trainer.pattern = text::piece_pattern_from_name(options.pattern);
  if (options.skip_bad_lines) folder.documents.bad_lines = text::BadLine::kSkip;
  if (!options.max_file_size.empty()) {
    folder.sources.max_file_bytes = text::parse_byte_size(options.max_file_size, "--max-file-size");
  }
  ProgressLine line;
  folder.trainer.progress = [&line](const char* phase, int64_t done, int64_t total) {
    line.show(phase, done, total);
  };
  const int64_t start = monotonic_ns();
  const text::FolderReport report = text::train_tokenizer_folder(folder);
  line.clear();
  print_tokenizer(folder.output, report);
  const std::string left_out = report.sources.summary();
  if (!left_out.empty()) fmt::print("{}\n", left_out);
  if (report.up_to_date) {
    fmt::print("up to date: made from the same text with the same options, nothing changed\n");
    return;
  }
  fmt::print("trained on {} of text ({} distinct pieces) in {}\n",
             format_bytes(report.corpus_bytes), format_count(report.distinct_pieces),
             format_duration(static_cast<double>(monotonic_ns() - start) * 1e-9));
  if (report.tokenizer.vocab_size() < folder.trainer.vocab_size) {
    fmt::print("the text has pairs for {} of the {} tokens asked for\n",
               format_count(report.tokenizer.vocab_size()),
               format_count(folder.trainer.vocab_size));
  }
}

void run_import(const ImportOptions& options) {
  const text::FolderReport report =
      text::import_tokenizer_folder(options.input, options.output, options.force);
  print_tokenizer(options.output, report);
  fmt::print("{}\n", report.up_to_date ? "up to date: the folder already holds this tokenizer"
                                       : "imported from " + options.input.string());
}

void add_corpus_options(CLI::App& verb, TrainOptions& options) {
  text::SourceOptions& sources = options.folder.sources;
  verb.add_option("--input", sources.inputs,
                  "Files and folders; .jsonl, .gz and .zst are understood")
      ->required()
      ->type_name("PATH");
  verb.add_option("--include", sources.include, "Take only paths that match (repeatable)")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  verb.add_option("--exclude", sources.exclude, "Leave out paths that match (repeatable)")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  verb.add_option("--max-file-size", options.max_file_size,
                  "Leave out larger files of folders, e.g. 512KiB")
      ->type_name("SIZE");
  verb.add_flag("--deduplicate", sources.deduplicate, "Take files with equal content once");
  verb.add_option("--field", options.folder.documents.field, "Key of the text in JSONL")
      ->type_name("NAME")
      ->capture_default_str();
  verb.add_flag("--skip-bad-lines", options.skip_bad_lines,
                "Leave out JSONL lines that cannot be read");
}

void add_train_verb(CLI::App& tokenizer) {
  CLI::App* verb = tokenizer.add_subcommand("train", "Learn a byte-level BPE vocabulary from text");
  auto options = std::make_shared<TrainOptions>();
  text::TrainFolderOptions& folder = options->folder;
  add_corpus_options(*verb, *options);
  verb->add_option("--vocab-size", folder.trainer.vocab_size,
                   "Tokens in all: special ones, 256 bytes and merges")
      ->required()
      ->type_name("N");
  verb->add_option("--special-token", folder.trainer.special_tokens,
                   "Special token (repeatable); the first ends texts")
      ->type_name("TEXT")
      ->allow_extra_args(false)
      ->default_str("<|endoftext|>");
  verb->add_option("--pattern", options->pattern,
                   "How text is cut into pieces: gpt2, llama3, qwen2")
      ->type_name("NAME")
      ->capture_default_str();
  verb->add_option("--output", folder.output, "Folder to write")->required()->type_name("DIR");
  verb->add_option("--threads", folder.trainer.threads, "Threads that count; 0 = one per processor")
      ->type_name("N")
      ->check(CLI::Range(0, 1024));
  verb->add_flag("--force", folder.force, "Replace a different tokenizer in the folder");
  verb->footer(
      "The result depends on the text and the options, not on the number of threads.\n"
      "Example:\n"
      "  capstan data tokenizer train --input docs --include '*.md' --vocab-size 8192 \\\n"
      "    --output data/my/tokenizer");
  verb->callback([options] { run_train(*options); });
}

void add_import_verb(CLI::App& tokenizer) {
  CLI::App* verb =
      tokenizer.add_subcommand("import", "Check and copy a Hugging Face tokenizer.json");
  auto options = std::make_shared<ImportOptions>();
  verb->add_option("--input", options->input, "tokenizer.json or the folder that holds it")
      ->required()
      ->type_name("PATH");
  verb->add_option("--output", options->output, "Folder to write")->required()->type_name("DIR");
  verb->add_flag("--force", options->force, "Replace a different tokenizer in the folder");
  verb->footer(
      "Example:\n"
      "  capstan data tokenizer import --input Llama-3.2-1B/tokenizer.json --output data/llama3");
  verb->callback([options] { run_import(*options); });
}

}  // namespace

void add_data_tokenizer(CLI::App& data) {
  CLI::App* tokenizer = data.add_subcommand("tokenizer", "Train or import a tokenizer");
  tokenizer->require_subcommand(0, 1);
  tokenizer->footer(
      "Example:\n"
      "  capstan data tokenizer train --input my.txt --vocab-size 8192 --output data/my/tokenizer");
  tokenizer->callback([tokenizer] {
    if (tokenizer->get_subcommands().empty()) throw CLI::CallForHelp();
  });
  add_train_verb(*tokenizer);
  add_import_verb(*tokenizer);
}

}  // namespace capstan::cli
