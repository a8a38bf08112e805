// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "capstan/base/philox.h"
#include "trainer/prove_internal.h"

namespace capstan::trainer {
namespace {

constexpr int64_t kUnknownVocabulary = 50257;  // while the tokenizer is not read

plan::Plan plan_for(const ProveOptions& options, int world) {
  plan::Topology topology = plan::local_topology(world, world, "cpu");
  topology.memory_bytes = 0;
  if (options.recipe.recipe.run.device == "cuda") topology.device = "cuda";
  plan::PlanInputs inputs;
  if (!options.recipe.recipe.model.vocab_size) inputs.tokenizer_vocab_size = kUnknownVocabulary;
  return plan::make_plan(options.recipe, topology, inputs);
}

// Sizes of the data axis worth trying when the recipe leaves it open.
std::vector<int64_t> data_sizes(const recipe::Zero& zero) {
  const int64_t shard = zero.shard_size.value_or(1);
  std::vector<int64_t> sizes = {2 * shard, shard, 1};
  for (int64_t n = 4; n <= 64; n *= 2) sizes.push_back(n * shard);
  return sizes;
}

int64_t draw(const DrawnRows& rows, int64_t sample, int64_t index, int64_t below) {
  const uint64_t bits =
      philox::bits64(rows.seed, static_cast<uint64_t>(sample), static_cast<uint64_t>(index));
  return static_cast<int64_t>(bits % static_cast<uint64_t>(below));
}

// Streams of one sample: tokens from 0, ignored targets and document starts from here.
constexpr int64_t kIgnored = int64_t{1} << 40, kStarts = int64_t{2} << 40;

bool is_ignored(const DrawnRows& rows, int64_t sample, int64_t t) {
  if (sample % 8 == 5) return true;
  if (sample % 3 == 1) return t > 3;
  return draw(rows, sample, kIgnored + t, 7) == 0;
}

bool starts_document(const DrawnRows& rows, int64_t sample, int64_t t) {
  if (t == 0) return true;
  return rows.documents == data::Documents::kSeparate &&
         draw(rows, sample, kStarts + t, 2 + sample % 9) == 0;
}

}  // namespace

plan::Plan plan_whole_run(const ProveOptions& options) {
  const recipe::Parallel& p = options.recipe.recipe.parallel;
  if (options.world) return plan_for(options, *options.world);
  const int64_t rest = p.tensor * p.pipeline.size * p.context.size;
  if (p.data) return plan_for(options, static_cast<int>(*p.data * rest));
  for (const int64_t data : data_sizes(p.zero)) {
    try {
      return plan_for(options, static_cast<int>(data * rest));
    } catch (const recipe::RecipeError&) {
    }
  }
  return plan_for(options, static_cast<int>(data_sizes(p.zero).front() * rest));  // says why
}

data::SampleBatch draw_rows(const DrawnRows& rows) {
  data::SampleBatch batch = data::make_batch(rows.samples, rows.length);
  for (int64_t i = 0; i < rows.samples; ++i) {
    const int64_t sample = rows.first + i;
    batch.global_sample[static_cast<size_t>(i)] = sample;
    batch.valid[static_cast<size_t>(i)] = 1;
    int64_t first = 0, document = -1;
    for (int64_t t = 0; t < rows.length; ++t) {
      const auto at = static_cast<size_t>(i * rows.length + t);
      if (starts_document(rows, sample, t)) {
        first = t;
        ++document;
      }
      batch.tokens[at] = draw(rows, sample, t, rows.vocab);
      batch.targets[at] =
          is_ignored(rows, sample, t) ? data::kIgnoreTarget : draw(rows, sample, t + 1, rows.vocab);
      batch.positions[at] = t - first;
      batch.document_ids[at] = document;
    }
  }
  return batch;
}

}  // namespace capstan::trainer
