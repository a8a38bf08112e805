// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Held-out loss of a model: over the sets of a recipe during training, and for `capstan eval`.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "capstan/data/validation.h"
#include "capstan/engine/engine.h"

namespace capstan::trainer {

struct EvalResult {
  std::string set;
  double loss = 0;  // nats per token
  double perplexity = 0;
  std::optional<double> bits_per_byte;
  int64_t target_tokens = 0;
};

struct TokenScore {
  int64_t document = 0, position = 0, token = 0;
  std::optional<double> logprob;  // none for the first token of a context window
};
struct EvalOptions {
  std::optional<int64_t> samples;                    // sequences; none = the whole set
  std::function<void(const TokenScore&)> per_token;  // one rank only
};
// Each data rank scores its share of the rows; the result is the same on all. Collective over:
// world.
[[nodiscard]] EvalResult evaluate(engine::Engine& engine, mesh::Mesh& mesh,
                                  const data::ValidationSet& set, data::Documents documents,
                                  const EvalOptions& options);

}  // namespace capstan::trainer
