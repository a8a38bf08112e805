// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Choosing the next token from logits. Pure: the choice depends on logits, options and the position
// only, so a text is the same again for the same seed on any number of threads.
#pragma once
#include <cstdint>
#include <span>

namespace capstan::infer {

struct SamplingOptions {
  double temperature = 1.0;  // 0 = greedy
  int64_t top_k = 0;         // keep the k likeliest; 0 = all
  double top_p = 1.0;  // then the smallest set of likeliest tokens whose probability reaches p
  uint64_t seed = 0;
};
// Throws ConfigError naming the option that is out of range.
void check_sampling(const SamplingOptions& options);

// `sequence` and `position` name the draw. Ties go to the smaller id. Logits that are not finite
// are never chosen; throws DivergenceError when none is finite.
[[nodiscard]] int64_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                                   uint64_t sequence, uint64_t position);

}  // namespace capstan::infer
