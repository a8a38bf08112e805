// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// bench_tokenizer train CORPUS VOCAB THREADS OUTPUT_DIR | bench_tokenizer encode CORPUS
// TOKENIZER_DIR Prints one line of JSON: seconds, and for encode megabytes per second on one core.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/text/bpe_trainer.h"
#include "capstan/text/tokenizer.h"

namespace {

using namespace capstan;

double seconds_since(int64_t start) { return static_cast<double>(monotonic_ns() - start) * 1e-9; }

void train(char** argv) {
  text::SourceOptions selection;
  selection.inputs = {argv[2]};
  const std::vector<text::Source> sources = text::list_sources(selection);
  text::BpeTrainerOptions options;
  options.vocab_size = std::atoll(argv[3]);
  options.threads = std::atoi(argv[4]);
  const int64_t start = monotonic_ns();
  int64_t counted = start;
  options.progress = [&counted](const char* phase, int64_t, int64_t) {
    if (phase[0] == 'c') counted = monotonic_ns();
  };
  const text::BpeTrainerResult result = text::train_bpe(sources, {}, options);
  const double total = seconds_since(start);
  create_directories_durable(argv[5]);
  write_file_atomic(Path(argv[5]) / "tokenizer.json", text::tokenizer_json(result));
  fmt::print(
      "{{\"train_s\": {:.2f}, \"count_s\": {:.2f}, \"vocab\": {}, \"distinct\": {}, "
      "\"resident_mb\": {}}}\n",
      total, static_cast<double>(counted - start) * 1e-9, result.token_bytes.size(),
      result.distinct_pieces, resident_bytes() / 1000000);
}

void encode(char** argv) {
  const text::Tokenizer tokenizer = text::Tokenizer::load(argv[3]);
  const std::string corpus = read_file(argv[2]);
  double best = 1e30;
  size_t tokens = 0;
  std::vector<int32_t> ids;
  for (int round = 0; round < 3; ++round) {
    const int64_t start = monotonic_ns();
    ids = tokenizer.encode(corpus);
    best = std::min(best, seconds_since(start));
    tokens = ids.size();
  }
  const bool exact = tokenizer.decode(ids) == corpus;
  fmt::print("{{\"encode_mb_per_s\": {:.1f}, \"tokens\": {}, \"round_trip\": {}}}\n",
             static_cast<double>(corpus.size()) / best * 1e-6, tokens, exact);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::string verb = argc > 1 ? argv[1] : "";
    if (verb == "train" && argc == 6) return train(argv), 0;
    if (verb == "encode" && argc == 4) return encode(argv), 0;
    fmt::print(stderr,
               "usage: bench_tokenizer train CORPUS VOCAB THREADS DIR | encode CORPUS DIR\n");
    return 2;
  } catch (const capstan::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.exit_code();
  }
}
