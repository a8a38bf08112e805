// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Run, model shape and rank grid out of a recipe.
#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/bytes.h"
#include "capstan/base/gpu.h"
#include "capstan/base/text.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {

void Draft::refuse(ProblemText text) {
  recipe::Problem problem;
  problem.origin = input.origin_of(text.key);
  problem.key = std::move(text.key);
  problem.got = std::move(text.got);
  problem.need = std::move(text.need);
  problem.why = std::move(text.why);
  problem.fix = std::move(text.fix);
  problems.push_back(std::move(problem));
}

void Draft::choose(const std::string& key, const std::string& value, const std::string& why) {
  choices.push_back(fmt::format("{}: auto -> {} ({})", key, value, why));
}

bool Draft::is_given(const std::string& key) const { return input.origin_of(key).line > 0; }

std::string nearest_multiples(int64_t value, int64_t unit) {
  const int64_t below = value / unit * unit, above = below + unit;
  if (below == value) return std::to_string(value);
  return below == 0 ? std::to_string(above) : fmt::format("{} or {}", below, above);
}

std::string nearest_divisors(int64_t count, int64_t wanted) {
  int64_t below = 1, above = count;
  for (int64_t d = 1; d <= count; ++d) {
    if (count % d != 0) continue;
    if (d <= wanted) below = d;
    if (d >= wanted) {
      above = d;
      break;
    }
  }
  return below == above ? std::to_string(below) : fmt::format("{} or {}", below, above);
}

void resolve_run(Draft& draft) {
  recipe::Run& run = draft.recipe.run;
  const Topology& topology = draft.topology;
  if (run.device == "auto") {
    run.device = topology.device;
    draft.choose("run.device", run.device, "what this machine offers");
  } else if (run.device != topology.device) {
    draft.refuse({"run.device", run.device, topology.device,
                  gpu_obstacle(topology.local_size) + "; capstan doctor shows what is here",
                  "Set run.device: auto"});
  }
  if (!run.directory) {
    run.directory = "runs/" + run.name;
    draft.choose("run.directory", *run.directory, "from run.name");
  }
  const int local = std::max(topology.local_size, 1), cores = std::max(topology.physical_cores, 1);
  if (!run.threads) {
    run.threads = std::max(1, cores / local);
    draft.choose("run.threads", std::to_string(*run.threads),
                 fmt::format("{} physical cores, {} ranks here", cores, local));
  }
  if (*run.threads * local > cores)
    draft.choices.push_back(fmt::format(
        "warning: {} ranks x {} threads on {} physical cores: they share cores and run slower",
        local, *run.threads, cores));
}

namespace {

void resolve_vocabulary(Draft& draft, ModelShape& shape) {
  recipe::Model& model = draft.recipe.model;
  const std::optional<int64_t> tokenizer = draft.inputs.tokenizer_vocab_size;
  if (!model.vocab_size && tokenizer) {
    model.vocab_size = tokenizer;
    draft.choose("model.vocab_size", std::to_string(*tokenizer), "size of data.tokenizer");
  }
  if (!model.vocab_size) {
    draft.refuse(
        {"model.vocab_size", "auto without a tokenizer", "the size of the vocabulary",
         "auto takes it from tokenizer.json in data.tokenizer, and there is none",
         "Write model.vocab_size, or make the tokenizer: capstan data tokenizer train --help"});
    return;
  }
  if (tokenizer && *model.vocab_size < *tokenizer)
    draft.refuse({"model.vocab_size", std::to_string(*model.vocab_size),
                  fmt::format("at least {}", *tokenizer),
                  "data.tokenizer makes ids up to that size", "Set model.vocab_size: auto"});
  shape.vocab_size = *model.vocab_size;
}

void resolve_heads(Draft& draft, ModelShape& shape) {
  recipe::Model& model = draft.recipe.model;
  const int64_t heads = model.num_attention_heads;
  if (!model.num_key_value_heads) {
    model.num_key_value_heads = heads;
    draft.choose("model.num_key_value_heads", std::to_string(heads), "num_attention_heads");
  }
  shape.num_key_value_heads = *model.num_key_value_heads;
  if (heads % shape.num_key_value_heads != 0)
    draft.refuse({"model.num_key_value_heads", std::to_string(shape.num_key_value_heads),
                  fmt::format("a divisor of num_attention_heads {}", heads),
                  "each key/value head serves the same number of query heads", ""});
  if (!model.head_dim && model.hidden_size % heads != 0) {
    draft.refuse({"model.hidden_size", std::to_string(model.hidden_size),
                  fmt::format("a multiple of num_attention_heads {}", heads),
                  "model.head_dim is auto = hidden_size / num_attention_heads",
                  fmt::format("Nearest: {}; or write model.head_dim",
                              nearest_multiples(model.hidden_size, heads))});
    shape.head_dim = 2;
    return;
  }
  if (!model.head_dim) {
    model.head_dim = model.hidden_size / heads;
    draft.choose("model.head_dim", std::to_string(*model.head_dim),
                 "hidden_size / num_attention_heads");
  }
  shape.head_dim = *model.head_dim;
  if (shape.head_dim % 2 != 0 && shape.family != "gpt2")
    draft.refuse({"model.head_dim", std::to_string(shape.head_dim), "an even number",
                  "rotary positions turn pairs of elements", ""});
}

void resolve_positions(Draft& draft, ModelShape& shape) {
  recipe::Model& model = draft.recipe.model;
  const int64_t length = draft.recipe.batch.sequence_length;
  if (!model.max_position_embeddings) {
    model.max_position_embeddings = length;
    draft.choose("model.max_position_embeddings", std::to_string(length), "batch.sequence_length");
  }
  shape.max_position_embeddings = *model.max_position_embeddings;
  if (length > shape.max_position_embeddings)
    draft.refuse(
        {"batch.sequence_length", std::to_string(length),
         fmt::format("at most model.max_position_embeddings {}", shape.max_position_embeddings),
         "the model has no positions beyond", "Shorten the sequence, or raise the other key"});
}

}  // namespace

ModelShape resolve_shape(Draft& draft) {
  const recipe::Model& model = draft.recipe.model;
  ModelShape shape;
  shape.family = model.family;
  shape.hidden_size = model.hidden_size;
  shape.intermediate_size = model.intermediate_size;
  shape.num_hidden_layers = model.num_hidden_layers;
  shape.num_attention_heads = model.num_attention_heads;
  shape.hidden_act = model.hidden_act;
  shape.rms_norm_eps = model.rms_norm_eps;
  shape.layer_norm_eps = model.layer_norm_eps;
  shape.rope_theta = model.rope_theta;
  shape.sliding_window = model.sliding_window;
  shape.attention_bias = model.attention_bias;
  shape.attention_output_bias = model.attention_output_bias;
  shape.qk_norm = model.qk_norm;
  shape.tie_word_embeddings = model.tie_word_embeddings;
  shape.initializer_range = model.initializer_range;
  resolve_vocabulary(draft, shape);
  resolve_heads(draft, shape);
  resolve_positions(draft, shape);
  resolve_experts(draft, shape);
  return shape;
}

namespace {

// Data-parallel ranks, or nothing when the world size does not fit the axes.
std::optional<int64_t> resolve_data_axis(Draft& draft) {
  recipe::Parallel& parallel = draft.recipe.parallel;
  const int64_t world = draft.topology.world_size;
  const int64_t tensor = parallel.tensor, pipeline = parallel.pipeline.size,
                context = parallel.context.size;
  const int64_t rest = tensor * pipeline * context;  // each at most 65536
  const std::string factors =
      fmt::format("tensor {} x pipeline {} x context {}", tensor, pipeline, context);
  if (!parallel.data) {
    if (world % rest != 0) {
      draft.refuse(
          {"parallel.data", fmt::format("world size {}", world),
           fmt::format("a multiple of {} = {}", factors, rest), "every axis of the grid is full",
           fmt::format("Start {} ranks, or change the axes", nearest_multiples(world, rest))});
      return std::nullopt;
    }
    parallel.data = world / rest;
    draft.choose("parallel.data", std::to_string(*parallel.data),
                 fmt::format("world size {} / ({})", world, factors));
    return parallel.data;
  }
  const auto product = checked_multiply(*parallel.data, rest);
  if (!product || *product != world) {
    const std::string whole = product ? std::to_string(*product) : "more than any world size";
    std::vector<std::string> ways;
    if (product) ways.push_back(fmt::format("Start {} ranks", whole));
    if (world % rest == 0) ways.push_back(fmt::format("set parallel.data: {}", world / rest));
    if (ways.size() < 2) ways.emplace_back("change the axes");
    draft.refuse({"parallel.data", fmt::format("world size {}", world),
                  fmt::format("data {} x {} = {}", *parallel.data, factors, whole),
                  "every axis of the grid is full", join(ways, ", or ")});
    return std::nullopt;
  }
  return parallel.data;
}

// False when there are no such shards.
bool resolve_zero(Draft& draft, int64_t data, Grid::Sizes& sizes) {
  recipe::Zero& zero = draft.recipe.parallel.zero;
  if (zero.reduce == "auto") {
    zero.reduce = zero.stage >= 2 ? "micro_batch" : "step";
    draft.choose("parallel.zero.reduce", zero.reduce, fmt::format("stage {}", zero.stage));
  }
  sizes.dp_replicate = static_cast<int>(data);
  if (zero.stage == 0) {  // no shards, so shard_size keeps its neutral value
    if (zero.shard_size.value_or(1) != 1)
      draft.refuse({"parallel.zero.shard_size", std::to_string(*zero.shard_size), "auto",
                    "stage 0 keeps whole copies",
                    "Leave the key out, or raise parallel.zero.stage"});
    return true;
  }
  if (!zero.shard_size) {
    zero.shard_size = data;
    draft.choose("parallel.zero.shard_size", std::to_string(data), "all data-parallel ranks");
  }
  if (data % *zero.shard_size != 0) {
    draft.refuse({"parallel.zero.shard_size", std::to_string(*zero.shard_size),
                  fmt::format("a divisor of the {} data-parallel ranks", data),
                  "every copy is cut into as many shards",
                  fmt::format("Nearest: {}", nearest_divisors(data, *zero.shard_size))});
    return false;
  }
  sizes.dp_shard = static_cast<int>(*zero.shard_size);
  sizes.dp_replicate = static_cast<int>(data / *zero.shard_size);
  return true;
}

}  // namespace

std::optional<Grid> resolve_grid(Draft& draft, const ModelShape& shape) {
  const recipe::Parallel& parallel = draft.recipe.parallel;
  const size_t before = draft.problems.size();
  check_layout(draft, shape);
  const std::optional<int64_t> data = resolve_data_axis(draft);
  Grid::Sizes sizes;
  const bool has_shards = data && resolve_zero(draft, *data, sizes);
  check_expert_axis(draft, shape, has_shards ? std::optional(sizes.dp_shard) : std::nullopt);
  if (!data) return std::nullopt;
  if (draft.problems.size() != before) {
    // The batch can still be checked against the number of data-parallel ranks.
    sizes = {};
    sizes.dp_replicate = static_cast<int>(*data);
    return Grid(sizes);
  }
  sizes.tp = static_cast<int>(parallel.tensor);
  sizes.cp = static_cast<int>(parallel.context.size);
  sizes.pp = static_cast<int>(parallel.pipeline.size);
  sizes.ep = static_cast<int>(parallel.expert);
  return Grid(sizes);
}

}  // namespace capstan::plan
