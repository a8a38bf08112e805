// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan eval`: held-out loss of a trained model on a token file, a text or JSONL.
#include <fmt/format.h>

#include <cmath>
#include <fstream>
#include <numbers>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/data/prepare.h"
#include "capstan/infer/session.h"
#include "capstan/trainer/evaluate.h"
#include "device_option.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct EvalArguments {
  std::string model, data, per_token_file, unigram, samples = "all", field = "text",
                                                    device = "auto";
  std::optional<double> minimum_gain;
  int64_t threads = 0;
  bool json = false;
};

// A folder of our own that goes with the object.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "capstan-eval-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr)
      throw EnvError({.module = "cli", .what = "making a temporary folder " + pattern});
    path_ = pattern;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  [[nodiscard]] const Path& path() const { return path_; }

 private:
  Path path_;
};

// The prefix of a pair; text is tokenized into a scratch folder first.
std::string token_prefix(const EvalArguments& arguments, const infer::Session& session,
                         const ScratchFolder& scratch) {
  if (std::filesystem::exists(data::idx_path(arguments.data))) return arguments.data;
  const std::string& name = arguments.data;
  if (name.ends_with(".idx") || name.ends_with(".bin")) return name.substr(0, name.size() - 4);
  const std::string prefix = (scratch.path() / "text").string();
  (void)data::prepare({.inputs = {name},
                       .tokenizer = session.step_folder().string(),
                       .output = prefix,
                       .field = arguments.field,
                       .workers = 1});
  return prefix;
}

std::optional<int64_t> parse_samples(const std::string& text) {
  if (text == "all") return std::nullopt;
  size_t used = 0;
  long long value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used != text.size() || value < 1)
    throw ConfigError(
        {.module = "cli", .what = "--samples", .got = text, .need = "a number from 1, or all"});
  return value;
}

class TokenScores {
 public:
  explicit TokenScores(const std::string& path) : file_(path) {
    if (!file_)
      throw EnvError({.module = "cli",
                      .what = "writing --per-token " + path,
                      .got = "a file that cannot be created"});
  }
  void add(const trainer::TokenScore& score) {
    file_ << fmt::format("{{\"document\":{},\"position\":{},\"token\":{},\"logprob\":{}}}\n",
                         score.document, score.position, score.token,
                         score.logprob ? json::number(*score.logprob) : "null");
  }
  void close(const std::string& path) {
    file_.close();
    if (!file_)
      throw EnvError({.module = "cli",
                      .what = "writing --per-token " + path,
                      .got = "a write error",
                      .fix = "Is the disk full?"});
  }

 private:
  std::ofstream file_;
};

struct Outcome {
  trainer::EvalResult result;
  std::optional<double> unigram, unigram_bits_per_byte;
  [[nodiscard]] double gain() const { return *unigram - result.loss; }
};

Outcome score(const EvalArguments& arguments) {
  infer::SessionOptions options{.model = arguments.model};
  if (arguments.threads > 0) options.threads = arguments.threads;
  start_device(arguments.device);
  infer::Session session(options);
  const ScratchFolder scratch;
  const int64_t vocab = session.plan().model().shape.vocab_size;
  const data::Documents documents = data::parse_documents(session.plan().resolved.data.documents);
  const data::ValidationSet set(
      {.name = arguments.data,
       .path = token_prefix(arguments, session, scratch),
       .sequence_length = session.plan().batch.sequence_length,
       .documents = documents,
       .vocab_size = vocab,
       .tokenizer_fingerprint = session.has_tokenizer() ? session.tokenizer().fingerprint() : ""});
  const std::optional<int64_t> samples = parse_samples(arguments.samples);
  std::optional<TokenScores> scores;
  trainer::EvalOptions eval{.samples = samples};
  if (!arguments.per_token_file.empty()) {
    scores.emplace(arguments.per_token_file);
    eval.per_token = [&](const trainer::TokenScore& token) { scores->add(token); };
  }
  mesh::Mesh mesh;
  Outcome outcome{.result = trainer::evaluate(session.engine(), mesh, set, documents, eval)};
  if (scores) scores->close(arguments.per_token_file);
  if (!arguments.unigram.empty()) {
    outcome.unigram = data::unigram_loss(data::TokenFile(arguments.unigram), set, vocab, samples);
    if (const auto bytes = set.bytes_per_token())
      outcome.unigram_bits_per_byte = *outcome.unigram / std::numbers::ln2 / *bytes;
  }
  return outcome;
}

void print(const Outcome& o) {
  const auto bits = [](const std::optional<double>& value) {
    return value ? fmt::format(", {:.4f} bits per byte", *value) : "";
  };
  fmt::print("{}: {} target tokens\n", o.result.set, o.result.target_tokens);
  fmt::print("  model    {:.4f} nats per token{}, perplexity {:.2f}\n", o.result.loss,
             bits(o.result.bits_per_byte), o.result.perplexity);
  if (o.unigram)
    fmt::print("  unigram  {:.4f} nats per token{}\n  gain     {:.4f} nats per token\n", *o.unigram,
               bits(o.unigram_bits_per_byte), o.gain());
}

void print_json(const Outcome& o) {
  json::Json line = {{"set", o.result.set},
                     {"loss", o.result.loss},
                     {"perplexity", o.result.perplexity},
                     {"target_tokens", o.result.target_tokens}};
  line["bits_per_byte"] =
      o.result.bits_per_byte ? json::Json(*o.result.bits_per_byte) : json::Json();
  if (o.unigram) {
    line["unigram_loss"] = *o.unigram;
    line["gain"] = o.gain();
  }
  fmt::print("{}\n", line.dump());
}

void eval(const EvalArguments& arguments) {
  if (arguments.minimum_gain && arguments.unigram.empty())
    throw ConfigError({.module = "cli",
                       .what = "--minimum-gain",
                       .got = "no --unigram PREFIX",
                       .need = "the training pair to compare with"});
  const Outcome outcome = score(arguments);
  arguments.json ? print_json(outcome) : print(outcome);
  std::fflush(stdout);
  if (arguments.minimum_gain && !(outcome.gain() >= *arguments.minimum_gain)) {
    fmt::print(stderr, "error: the model gains {:.4f} nats over the unigram model, need {}\n",
               outcome.gain(), *arguments.minimum_gain);
    throw Exit{exit_codes::kFailure};
  }
}

}  // namespace

void add_eval(CLI::App& app) {
  auto arguments = std::make_shared<EvalArguments>();
  CLI::App* verb = app.add_subcommand("eval", "held-out loss of a trained model");
  verb->add_option("--model", arguments->model, "run directory (newest step) or step-* folder")
      ->required()
      ->type_name("DIR");
  verb->add_option("--data", arguments->data, "text file, JSONL, or prefix of a .bin/.idx pair")
      ->required()
      ->type_name("FILE");
  verb->add_option("--field", arguments->field, "key of the text in JSONL");
  verb->add_option("--per-token", arguments->per_token_file, "write log p of every token as JSONL")
      ->type_name("FILE");
  verb->add_option("--unigram", arguments->unigram,
                   "compare with token frequencies counted on this pair")
      ->type_name("PREFIX");
  verb->add_option("--minimum-gain", arguments->minimum_gain,
                   "fail below this gain over the unigram model")
      ->type_name("NATS");
  verb->add_option("--samples", arguments->samples, "sequences to score, or all")
      ->type_name("N|all");
  add_device_option(*verb, arguments->device);
  verb->add_option("--threads", arguments->threads, "CPU threads; default all physical cores")
      ->check(CLI::Range(int64_t{1}, int64_t{1024}));
  verb->add_flag("--json", arguments->json, "one JSON object");
  verb->footer(
      "Example:\n  capstan eval --model runs/quickstart --data data/quickstart/validation "
      "--unigram data/quickstart/train");
  verb->callback([arguments] { eval(*arguments); });
}

}  // namespace capstan::cli
