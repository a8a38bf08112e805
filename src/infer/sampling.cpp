// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/infer/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/base/philox.h"

namespace capstan::infer {
namespace {

struct Candidate {
  int64_t id;
  double logit, weight;
};

bool is_likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

int64_t argmax(std::span<const float> logits) {
  int64_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i)
    if (std::isfinite(logits[i]) && (best < 0 || logits[i] > logits[static_cast<size_t>(best)]))
      best = static_cast<int64_t>(i);
  if (best < 0)
    throw DivergenceError({.module = "infer",
                           .what = "choosing the next token",
                           .got = "logits without a finite value",
                           .need = "at least one",
                           .fix = "The weights hold NaN or infinity: use an earlier step"});
  return best;
}

void keep_top_k(std::vector<Candidate>& candidates, int64_t k) {
  if (k <= 0 || k >= static_cast<int64_t>(candidates.size())) return;
  std::nth_element(candidates.begin(), candidates.begin() + k - 1, candidates.end(), is_likelier);
  candidates.resize(static_cast<size_t>(k));
}

void keep_top_p(std::vector<Candidate>& candidates, double p) {
  if (p >= 1) return;
  std::sort(candidates.begin(), candidates.end(), is_likelier);
  double total = 0, sum = 0;
  for (const Candidate& c : candidates) total += c.weight;
  size_t kept = 0;
  while (kept < candidates.size() && sum < p * total) sum += candidates[kept++].weight;
  candidates.resize(std::max<size_t>(1, kept));
}

}  // namespace

void check_sampling(const SamplingOptions& options) {
  const auto refuse = [](const char* what, const std::string& got, const char* need) {
    throw ConfigError({.module = "infer", .what = what, .got = got, .need = need});
  };
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature))
    refuse("--temperature", fmt::format("{}", options.temperature), "a number from 0 (0 = greedy)");
  if (options.top_k < 0)
    refuse("--top-k", fmt::format("{}", options.top_k), "a whole number from 0 (0 = all)");
  if (!(options.top_p > 0 && options.top_p <= 1))
    refuse("--top-p", fmt::format("{}", options.top_p), "a number above 0 and up to 1");
}

int64_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                     uint64_t sequence, uint64_t position) {
  const int64_t best = argmax(logits);
  if (options.temperature == 0 || options.top_k == 1) return best;
  const double top = logits[static_cast<size_t>(best)];
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isfinite(logits[i])) continue;
    candidates.push_back(
        {static_cast<int64_t>(i), logits[i], std::exp((logits[i] - top) / options.temperature)});
  }
  keep_top_k(candidates, options.top_k);
  keep_top_p(candidates, options.top_p);
  double total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  const uint64_t stream = philox::stream_of("sample", fmt::format("{}", sequence));
  double rest = philox::uniform(options.seed, stream, position) * total;
  for (const Candidate& c : candidates) {
    rest -= c.weight;
    if (rest < 0) return c.id;
  }
  return candidates.back().id;
}

}  // namespace capstan::infer
