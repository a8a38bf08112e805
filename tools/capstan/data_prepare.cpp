// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <string>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/data/prepare.h"
#include "capstan/text/sources.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct PrepareOptions {
  data::PrepareOptions prepare;
  std::string validation_output, max_file_size;
};

void print_pair(const char* name, const std::string& prefix, const data::Provenance& p) {
  fmt::print("{:<11} {}  {} documents, {} tokens, {} of text, {} in {}.bin\n", name, prefix,
             format_count(p.pair.documents), format_count(p.pair.tokens),
             format_bytes(p.text_bytes), format_bytes(p.pair.bin_bytes), prefix);
}

void print_report(const data::PrepareOptions& options, const data::PrepareReport& report) {
  print_pair(report.train.split.c_str(), options.output, report.train);
  if (report.validation) print_pair("validation", *options.validation_output, *report.validation);
  if (!report.left_out.empty()) fmt::print("{}\n", report.left_out);
  if (report.train.bad_line_count > 0) {
    fmt::print("left out: {} lines of JSONL{}{}\n", format_count(report.train.bad_line_count),
               report.first_bad_line.empty() ? "" : ", the first: ", report.first_bad_line);
  }
  if (report.up_to_date) {
    fmt::print("up to date: made from the same text with the same tokenizer, nothing written\n");
  } else {
    const int64_t bytes =
        report.train.text_bytes + (report.validation ? report.validation->text_bytes : 0);
    const double rate = report.seconds > 0 ? static_cast<double>(bytes) / report.seconds : 0;
    fmt::print("done in {}, {}/s\n", format_duration(report.seconds),
               format_bytes(static_cast<int64_t>(rate)));
  }
}

void run(PrepareOptions& options) {
  if (!options.validation_output.empty())
    options.prepare.validation_output = options.validation_output;
  if (!options.max_file_size.empty()) {
    options.prepare.max_file_bytes =
        text::parse_byte_size(options.max_file_size, "--max-file-size");
  }
  print_report(options.prepare, data::prepare(options.prepare));
}

}  // namespace

void add_data_prepare(CLI::App& app) {
  CLI::App* verb =
      app.add_subcommand("prepare", "Turn text files, folders and JSONL into token files");
  auto options = std::make_shared<PrepareOptions>();
  data::PrepareOptions& prepare = options->prepare;
  verb->add_option("--input", prepare.inputs,
                   "Files and folders; .jsonl, .gz and .zst are understood")
      ->required()
      ->type_name("PATH");
  verb->add_option("--include", prepare.include, "Take only paths that match (repeatable)")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  verb->add_option("--exclude", prepare.exclude, "Leave out paths that match (repeatable)")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  verb->add_option("--max-file-size", options->max_file_size,
                   "Leave out larger files of folders, e.g. 512KiB")
      ->type_name("SIZE");
  verb->add_flag("--deduplicate", prepare.deduplicate, "Take files with equal content once");
  verb->add_option("--tokenizer", prepare.tokenizer, "Folder with tokenizer.json")
      ->required()
      ->type_name("DIR");
  verb->add_option("--output", prepare.output, "Writes PREFIX.bin, PREFIX.idx, PREFIX.json")
      ->required()
      ->type_name("PREFIX");
  verb->add_option("--validation-output", options->validation_output, "Where held-out documents go")
      ->type_name("PREFIX");
  verb->add_option("--validation-fraction", prepare.validation_fraction,
                   "Share of documents to hold out, chosen by hash of the path")
      ->type_name("F");
  verb->add_option("--field", prepare.field, "Key of the text in JSONL")
      ->type_name("NAME")
      ->capture_default_str();
  verb->add_flag("--skip-bad-lines", prepare.skip_bad_lines,
                 "Leave out JSONL lines that cannot be read");
  verb->add_option("--workers", prepare.workers, "Threads that tokenize; 0 = one per processor")
      ->type_name("N")
      ->check(CLI::Range(0, 1024));
  verb->add_flag("--force", prepare.force, "Replace token files made from something else");
  verb->footer(
      "Example:\n"
      "  capstan data prepare --input docs notes.txt --tokenizer data/my/tokenizer --output "
      "data/my/train \\\n"
      "    --validation-output data/my/validation --validation-fraction 0.02");
  verb->callback([options] { run(*options); });
}

}  // namespace capstan::cli
