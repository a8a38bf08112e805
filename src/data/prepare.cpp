// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/prepare.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <utility>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/text/tokenizer.h"
#include "data/prepare_internal.h"

namespace capstan::data {
namespace {

constexpr int64_t kProgressNs = 10'000'000'000;

[[noreturn]] void refuse_option(std::string what, std::string got, std::string need,
                                std::string fix = {}) {
  throw ConfigError(ErrorText{.module = "data",
                              .what = std::move(what),
                              .got = std::move(got),
                              .need = std::move(need),
                              .fix = std::move(fix)});
}

void check_prefix(const char* flag, const std::string& prefix) {
  const Path path(prefix);
  if (prefix.empty() || !path.has_filename() || path.filename() == "." || path.filename() == "..") {
    refuse_option(flag, prefix.empty() ? "nothing" : prefix, "a prefix such as data/my/train",
                  "PREFIX.bin, PREFIX.idx and PREFIX.json are written");
  }
  const Path ending = path.extension();
  if (ending == ".bin" || ending == ".idx" || ending == ".json") {
    refuse_option(flag, prefix, "the prefix without an ending",
                  fmt::format("Use {}", Path(path).replace_extension().string()));
  }
}

void check_options(const PrepareOptions& options) {
  if (options.inputs.empty()) refuse_option("--input", "no path", "at least one file or folder");
  check_prefix("--output", options.output);
  const double fraction = options.validation_fraction;
  if (!options.validation_output) {
    if (fraction != 0) {
      refuse_option("--validation-fraction", fmt::format("{} alone", fraction),
                    "--validation-output PREFIX with it");
    }
    return;
  }
  check_prefix("--validation-output", *options.validation_output);
  if (!(fraction > 0 && fraction < 1)) {
    refuse_option("--validation-fraction", fmt::format("{}", fraction),
                  "a number between 0 and 1, both excluded");
  }
  if (std::filesystem::weakly_canonical(options.output) ==
      std::filesystem::weakly_canonical(*options.validation_output)) {
    refuse_option("--validation-output", *options.validation_output,
                  "another prefix than --output");
  }
}

// Keeps a second `data prepare` away from the prefix; the file is removed while it is still held.
class PrefixLock {
 public:
  explicit PrefixLock(const Path& prefix) : path_(prefix.string() + ".lock") {
    if (prefix.has_parent_path()) create_directories_durable(prefix.parent_path());
    const std::string mine =
        fmt::format("{} process {} since {}\n", host_name(), ::getpid(), utc_now());
    std::string holder;
    lock_ = LockFile::try_acquire(path_, mine, &holder);
    if (lock_) return;
    while (!holder.empty() && holder.back() == '\n') holder.pop_back();
    throw EnvError(
        ErrorText{.module = "data",
                  .what = fmt::format("writing {}", prefix.string()),
                  .got = fmt::format("another `capstan data prepare` at work ({})", holder),
                  .need = "one at a time",
                  .fix = "Wait for it or choose another --output"});
  }
  ~PrefixLock() {
    std::error_code ignored;
    if (lock_) std::filesystem::remove(path_, ignored);
  }
  PrefixLock(const PrefixLock&) = delete;
  PrefixLock& operator=(const PrefixLock&) = delete;

 private:
  Path path_;
  std::unique_ptr<LockFile> lock_;
};

struct Selection {
  std::vector<text::Source> sources;
  text::SourceCounts counts;
};

// Output that lies inside the input folder must not become input of the next run.
class OwnOutput {
 public:
  explicit OwnOutput(const PrepareOptions& options) {
    prefixes_.push_back(std::filesystem::weakly_canonical(options.output));
    if (options.validation_output) {
      prefixes_.push_back(std::filesystem::weakly_canonical(*options.validation_output));
    }
  }
  [[nodiscard]] bool contains(const Path& path) const {
    return std::any_of(prefixes_.begin(), prefixes_.end(), [&](const Path& prefix) {
      return has_our_name(path.filename().string(), prefix.filename().string() + ".") &&
             std::filesystem::weakly_canonical(path).parent_path() == prefix.parent_path();
    });
  }

 private:
  static bool has_our_name(const std::string& name, const std::string& stem) {
    if (!name.starts_with(stem)) return false;
    const std::string ending = name.substr(stem.size());
    return ending == "bin" || ending == "idx" || ending == "json" || ending == "lock" ||
           ending.ends_with("partial");
  }
  std::vector<Path> prefixes_;
};

Selection select_sources(const PrepareOptions& options) {
  text::SourceOptions source_options;
  source_options.inputs.assign(options.inputs.begin(), options.inputs.end());
  source_options.include = options.include;
  source_options.exclude = options.exclude;
  source_options.max_file_bytes = options.max_file_bytes;
  source_options.deduplicate = options.deduplicate;
  Selection selection;
  selection.sources = text::list_sources(source_options, &selection.counts);
  const OwnOutput own(options);
  std::erase_if(selection.sources,
                [&](const text::Source& source) { return own.contains(source.path); });
  if (selection.sources.empty()) {
    refuse_option("looking for text in --input", "no file but our own output", "at least one file");
  }
  return selection;
}

Provenance describe(const PrepareOptions& options, const Encoder& encoder,
                    const Selection& selection) {
  Provenance p;
  p.tokenizer_fingerprint = encoder.fingerprint;
  p.vocab_size = encoder.vocab_size;
  p.eos_id = encoder.eos_id;
  p.split = options.validation_output ? "train" : "all";
  p.validation_fraction = options.validation_fraction;
  p.field = options.field;
  p.bad_lines = options.skip_bad_lines ? "skip" : "stop";
  p.include = options.include;
  p.exclude = options.exclude;
  p.max_file_bytes = options.max_file_bytes;
  p.deduplicate = options.deduplicate;
  p.sources_xxh3 = text::content_digest(selection.sources);
  p.source_files = std::ssize(selection.sources);
  p.left_out_binary = selection.counts.binary + selection.counts.not_utf8;
  p.left_out_duplicates = selection.counts.duplicates;
  p.left_out_large = selection.counts.too_large;
  p.left_out_empty = selection.counts.empty;
  return p;
}

enum class Existing { kAbsent, kSame, kOther };

[[noreturn]] void refuse_existing(const Path& prefix, std::string got, std::string fix) {
  refuse_option(fmt::format("writing {}", prefix.string()), std::move(got),
                "a free prefix or the same corpus again", std::move(fix));
}

// What lies at the prefix; `found` receives the provenance of kSame.
Existing look_at(const Path& prefix, const Provenance& wanted, bool force, Provenance& found) {
  const auto exists = [](const Path& path) { return std::filesystem::exists(path); };
  std::optional<Provenance> present;
  bool is_damaged = false;
  try {
    present = read_provenance(prefix);
  } catch (const DataError&) {
    if (!force) throw;
    is_damaged = true;
  }
  if (!present && !is_damaged && exists(provenance_path(prefix))) {
    // Perhaps the very text that is being prepared: not even --force replaces it.
    refuse_existing(
        prefix, fmt::format("{}, which is not of this program", provenance_path(prefix).string()),
        "Choose another prefix");
  }
  if (!exists(idx_path(prefix))) {
    // Without an .idx there is no pair: either a killed run of ours, which may go, or somebody's
    // file.
    if (exists(bin_path(prefix)) && !present && !force) {
      refuse_existing(prefix, fmt::format("{} without an .idx", bin_path(prefix).string()),
                      "Choose another --output, or replace it with --force");
    }
    return Existing::kAbsent;
  }
  if (force && !(present && is_same_source(*present, wanted))) return Existing::kOther;
  if (!present || !is_same_source(*present, wanted)) {
    refuse_existing(prefix, "token files made from something else", "Replace them with --force");
  }
  try {
    const TokenFile file(prefix);
    if (file.full_bin_hash() == present->pair.bin_xxh3 &&
        file.full_idx_hash() == present->pair.idx_xxh3) {
      found = *present;
      return Existing::kSame;
    }
  } catch (const Error&) {
    // Damaged: the same answer as for a wrong hash.
  }
  if (!force)
    refuse_existing(prefix, "the same corpus, but damaged files", "Replace them with --force");
  return Existing::kOther;
}

// The pair or pairs that one run makes.
class Output {
 public:
  Output(const PrepareOptions& options, const Provenance& base) : options_(options), base_(base) {
    parts_.push_back({options.output, base});
    if (!options.validation_output) return;
    Provenance held_out = base;
    held_out.split = "validation";
    parts_.push_back({*options.validation_output, held_out});
  }

  // True when every pair is there and whole.
  bool is_up_to_date() {
    bool all = true;
    for (Part& part : parts_) {
      Provenance found;
      if (look_at(part.prefix, part.provenance, options_.force, found) != Existing::kSame) {
        all = false;
      } else {
        part.existing = found;
      }
    }
    if (!all) return false;
    for (Part& part : parts_) part.provenance = part.existing;
    return true;
  }

  void open(TokenType type) {
    for (Part& part : parts_) part.writer = std::make_unique<TokenWriter>(part.prefix, type);
  }

  void take(const EncodedDocument& document) {
    const bool is_held_out =
        parts_.size() == 2 && is_validation_document(document.key, options_.validation_fraction);
    Part& part = parts_[is_held_out ? 1 : 0];
    part.writer->add_document(document.tokens);
    part.provenance.text_bytes += document.text_bytes;
  }

  void commit(int64_t bad_lines, const std::function<void(std::string_view)>& stage) {
    check_splits();
    std::vector<TokenWriter*> writers;
    for (Part& part : parts_) {
      if (stage) stage(fmt::format("finish {}", part.prefix.string()));
      part.provenance.pair = part.writer->finish();
      part.provenance.bad_line_count = bad_lines;
      part.writer->set_provenance(to_json(part.provenance));
      writers.push_back(part.writer.get());
    }
    commit_pairs(writers, stage);
  }

  void fill(PrepareReport& report) const {
    report.train = parts_[0].provenance;
    if (parts_.size() == 2) report.validation = parts_[1].provenance;
  }

 private:
  struct Part {
    Path prefix;
    Provenance provenance;
    Provenance existing{};
    std::unique_ptr<TokenWriter> writer{};
  };

  void check_splits() const {
    int64_t documents = 0;
    for (const Part& part : parts_) documents += part.writer->documents();
    if (documents == 0) {
      throw DataError(ErrorText{.module = "data",
                                .what = "preparing --input",
                                .got = fmt::format("{} files without any text", base_.source_files),
                                .need = "at least one document that is not empty"});
    }
    for (const Part& part : parts_) {
      if (part.writer->documents() > 0) continue;
      refuse_option(fmt::format("splitting {} documents by --validation-fraction {}", documents,
                                options_.validation_fraction),
                    fmt::format("none for {}", part.prefix.string()), "at least one on each side",
                    documents == 1
                        ? "Give the held-out text as an --input of its own, in a run of its own"
                        : "Choose another fraction, or prepare held-out text in a run of its own");
    }
  }

  const PrepareOptions& options_;
  const Provenance& base_;
  std::vector<Part> parts_;
};

class Progress {
 public:
  explicit Progress(const Selection& selection) {
    for (const text::Source& source : selection.sources) total_ += source.size;
  }
  void add(int64_t bytes) {
    done_ += bytes;
    const int64_t now = monotonic_ns();
    if (now - shown_ns_ < kProgressNs) return;
    shown_ns_ = now;
    const double seconds = static_cast<double>(now - begin_ns_) * 1e-9;
    log::info("data", "{} of text so far, files of {} in all, {}/s", format_bytes(done_),
              format_bytes(total_),
              format_bytes(static_cast<int64_t>(static_cast<double>(done_) / seconds)));
  }

 private:
  int64_t total_ = 0, done_ = 0;
  int64_t begin_ns_ = monotonic_ns(), shown_ns_ = begin_ns_;
};

}  // namespace

bool is_validation_document(std::string_view key, double fraction) {
  CAPSTAN_CHECK(fraction >= 0 && fraction < 1, "a fraction of {}", fraction);
  return xxh3_64(key) < static_cast<uint64_t>(std::ldexp(fraction, 64));
}

PrepareReport prepare_with(const PrepareOptions& options, const Encoder& encoder,
                           const std::function<void(std::string_view)>& stage) {
  const int64_t begin_ns = monotonic_ns();
  check_options(options);
  const Selection selection = select_sources(options);
  const PrefixLock lock(options.output);
  std::optional<PrefixLock> validation_lock;
  if (options.validation_output) validation_lock.emplace(*options.validation_output);

  const Provenance base = describe(options, encoder, selection);
  Output output(options, base);
  PrepareReport report{.left_out = selection.counts.summary()};
  report.up_to_date = output.is_up_to_date();
  if (!report.up_to_date) {
    PipelineOptions pipeline{
        .sources = selection.sources, .encode = encoder.encode, .eos_id = encoder.eos_id};
    pipeline.documents.field = options.field;
    pipeline.documents.bad_lines =
        options.skip_bad_lines ? text::BadLine::kSkip : text::BadLine::kStop;
    pipeline.workers = options.workers > 0 ? options.workers : allowed_cpus();
    output.open(token_type_for(encoder.vocab_size));
    Progress progress(selection);
    const text::DocumentCounts counts = run_pipeline(pipeline, [&](EncodedDocument&& document) {
      output.take(document);
      progress.add(document.text_bytes);
    });
    report.first_bad_line = counts.first_bad_line;
    output.commit(counts.bad_lines, stage);
  }
  output.fill(report);
  report.seconds = static_cast<double>(monotonic_ns() - begin_ns) * 1e-9;
  return report;
}

PrepareReport prepare(const PrepareOptions& options) {
  check_options(options);
  const text::Tokenizer tokenizer = text::Tokenizer::load(options.tokenizer);
  const auto eos_id = tokenizer.eos_id();
  if (!eos_id) {
    refuse_option(fmt::format("--tokenizer {}", options.tokenizer), "no end-of-text token",
                  "one to end each document", "Name it as eos_token in tokenizer_config.json");
  }
  return prepare_with(
      options, Encoder{.encode = [&](std::string_view text) { return tokenizer.encode(text); },
                       .vocab_size = tokenizer.vocab_size(),
                       .eos_id = *eos_id,
                       .fingerprint = tokenizer.fingerprint()});
}

}  // namespace capstan::data
