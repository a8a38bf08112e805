// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/text.h"
#include "capstan/data/inspect.h"
#include "capstan/text/tokenizer.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct InspectOptions {
  std::string prefix, tokenizer;
  int64_t documents = 3, tokens = 64;
  bool json = false;
};

struct Sample {
  int64_t document = 0, size = 0;
  std::vector<int32_t> ids;  // the first ones
  std::optional<std::string> text;
};

std::vector<Sample> read_samples(const data::TokenFile& file, const InspectOptions& options,
                                 const std::optional<text::Tokenizer>& tokenizer) {
  std::vector<Sample> samples;
  for (int64_t i = 0; i < std::min(options.documents, file.documents()); ++i) {
    const data::TokenRange range = file.document(i);
    std::vector<int64_t> ids(static_cast<size_t>(std::min(options.tokens, range.size())));
    file.read(range.first, ids);
    Sample sample{.document = i, .size = range.size(), .ids = {ids.begin(), ids.end()}};
    if (tokenizer) sample.text = tokenizer->decode(sample.ids);
    samples.push_back(std::move(sample));
  }
  return samples;
}

// The first bytes of a text may end within a character, and a corpus may hold anything.
std::string valid_utf8(std::string text) {
  while (const auto at = find_invalid_utf8(text)) text.replace(*at, 1, "?");
  return text;
}

json::Json to_json(const data::InspectReport& report, const std::vector<Sample>& samples) {
  json::Json object{{"documents", report.documents},
                    {"sequences", report.sequences},
                    {"tokens", report.tokens},
                    {"dtype", data::name_of(report.type)},
                    {"bin_bytes", report.bin_bytes},
                    {"idx_bytes", report.idx_bytes},
                    {"shortest", report.shortest},
                    {"median", report.median},
                    {"longest", report.longest},
                    {"empty_documents", report.empty_documents},
                    {"largest_token", report.largest_token},
                    {"content_hash", report.content_hash},
                    {"provenance", nullptr},
                    {"samples", json::Json::array()}};
  if (report.provenance)
    object["provenance"] = json::Json::parse(data::to_json(*report.provenance));
  for (const Sample& sample : samples) {
    json::Json entry{{"document", sample.document}, {"tokens", sample.size}, {"ids", sample.ids}};
    if (sample.text) entry["text"] = valid_utf8(*sample.text);
    object["samples"].push_back(std::move(entry));
  }
  return object;
}

void print_samples(const std::vector<Sample>& samples) {
  for (const Sample& sample : samples) {
    fmt::print("document {} ({} tokens): ", sample.document, format_count(sample.size));
    if (sample.text) {
      fmt::print("{}\n", quote(*sample.text, 400));
    } else {
      fmt::print("{}{}\n", fmt::join(sample.ids, " "),
                 sample.size > std::ssize(sample.ids) ? " ..." : "");
    }
  }
}

void print_report(const data::TokenFile& file, const data::InspectReport& report) {
  fmt::print("{}  version 1, {}\n", data::idx_path(file.prefix()).string(),
             data::name_of(report.type));
  fmt::print("  documents     {}", format_count(report.documents));
  fmt::print("{}\n", report.sequences == report.documents
                         ? ""
                         : fmt::format(" in {} sequences", format_count(report.sequences)));
  fmt::print("  tokens        {} ({} in .bin, {} in .idx)\n", format_count(report.tokens),
             format_bytes(report.bin_bytes), format_bytes(report.idx_bytes));
  fmt::print("  per document  {} shortest, {} median, {} longest{}\n",
             format_count(report.shortest), format_count(report.median),
             format_count(report.longest),
             report.empty_documents > 0 ? fmt::format(", {} empty", report.empty_documents) : "");
  fmt::print("  largest id    {}\n  content       {}\n", report.largest_token, report.content_hash);
  if (!report.provenance) {
    fmt::print("  made by       unknown (no {})\n", data::provenance_path(file.prefix()).string());
    return;
  }
  const data::Provenance& p = *report.provenance;
  fmt::print(
      "  split         {}\n  text          {}, {:.3f} bytes per token\n", p.split,
      format_bytes(p.text_bytes),
      static_cast<double>(p.text_bytes) / static_cast<double>(std::max<int64_t>(p.pair.tokens, 1)));
  fmt::print("  tokenizer     {} ({} ids, end of text {})\n", p.tokenizer_fingerprint,
             format_count(p.vocab_size), p.eos_id);
}

void check_tokenizer(const std::optional<data::Provenance>& provenance,
                     const text::Tokenizer& tokenizer, const InspectOptions& options) {
  if (!provenance || provenance->tokenizer_fingerprint == tokenizer.fingerprint()) return;
  throw ConfigError(ErrorText{.module = "data",
                              .what = fmt::format("decoding {}", options.prefix),
                              .got = fmt::format("--tokenizer {} with fingerprint {}",
                                                 options.tokenizer, tokenizer.fingerprint()),
                              .need = provenance->tokenizer_fingerprint,
                              .why = "another tokenizer made the file"});
}

void run(const InspectOptions& options) {
  const data::TokenFile file(options.prefix);
  std::optional<text::Tokenizer> tokenizer;
  if (!options.tokenizer.empty()) {
    tokenizer = text::Tokenizer::load(options.tokenizer);
    check_tokenizer(data::read_provenance(file), *tokenizer, options);
  }
  const data::InspectReport report = data::inspect(file, tokenizer ? tokenizer->vocab_size() : 0);
  const std::vector<Sample> samples = read_samples(file, options, tokenizer);
  if (options.json) {
    fmt::print("{}\n", to_json(report, samples).dump(2));
    return;
  }
  print_report(file, report);
  print_samples(samples);
  fmt::print("every field{} checked\n", report.provenance ? ", hash and token" : " and token");
}

}  // namespace

void add_data_inspect(CLI::App& app) {
  CLI::App* verb =
      app.add_subcommand("inspect", "Check token files in full and show what they hold");
  auto options = std::make_shared<InspectOptions>();
  verb->add_option("prefix", options->prefix, "Prefix of a .bin/.idx pair")
      ->required()
      ->type_name("PREFIX");
  verb->add_option("--tokenizer", options->tokenizer,
                   "Folder with tokenizer.json, to show text instead of ids")
      ->type_name("DIR");
  verb->add_option("--documents", options->documents, "How many documents to show")
      ->check(CLI::Range(int64_t{0}, int64_t{1000000}))
      ->capture_default_str();
  verb->add_option("--tokens", options->tokens, "How many tokens of each")
      ->check(CLI::Range(int64_t{1}, int64_t{1000000}))
      ->capture_default_str();
  verb->add_flag("--json", options->json, "For programs");
  verb->footer(
      "Example:\n  capstan data inspect data/quickstart/train --tokenizer "
      "data/quickstart/tokenizer");
  verb->callback([options] { run(*options); });
}

}  // namespace capstan::cli
