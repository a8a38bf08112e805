// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The recipe as typed data. Field names are the recipe's keys (docs/recipes.md). std::optional
// without a value stands for `auto` or `none`, whichever the key has. Choices are kept in their
// spelling; validation guarantees that they are among the values of this build (values.h).
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "capstan/recipe/numerics.h"
#include "capstan/recipe/parallel.h"

namespace capstan::recipe {

struct Run {
  std::string name;
  std::optional<std::string> directory;  // auto = runs/<name>
  std::optional<int64_t> steps;          // exactly one of steps, tokens
  std::optional<int64_t> tokens;
  int64_t seed = 1234;
  std::string device = "auto";     // auto | cpu | cuda
  std::optional<int64_t> threads;  // auto
  bool deterministic = false;
  bool graphs = false;        // cuda: a step is replayed as graphs
  std::string gemm = "auto";  // auto | libtorch | cublaslt
  double start_timeout_s = 600;
  double step_timeout_s = 120;
};

struct RopeScaling {
  std::string rope_type = "default";
};

struct Experts {
  int64_t count = 0;  // 0 = dense
  int64_t per_token = 2;
  std::optional<int64_t> intermediate_size;  // auto = model.intermediate_size
  int64_t shared_intermediate_size = 0;      // 0 = no shared expert
  bool shared_gate = false;
  std::string router = "softmax";  // softmax | sigmoid
  bool normalize_weights = true;
  int64_t groups = 1;
  int64_t groups_per_token = 1;
  double scaling = 1;
  double auxiliary_loss = 0;
  std::string auxiliary_scope = "sequence";  // sequence | global
  double z_loss = 0;
  double bias_update_rate = 0;            // 0 = off
  std::optional<double> capacity_factor;  // none = dropless
};

struct Model {
  std::optional<std::string> from;
  std::string family = "llama";
  std::optional<int64_t> vocab_size;  // auto = size of the tokenizer
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  std::optional<int64_t> num_key_value_heads;      // default num_attention_heads
  std::optional<int64_t> head_dim;                 // auto = hidden_size / num_attention_heads
  std::optional<int64_t> max_position_embeddings;  // auto = batch.sequence_length
  std::string hidden_act = "silu";
  double rms_norm_eps = 1e-5;
  double layer_norm_eps = 1e-5;  // gpt2
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  std::optional<int64_t> sliding_window;  // none
  bool attention_bias = false;
  bool attention_output_bias = false;  // left out: as attention_bias
  bool qk_norm = false;
  bool tie_word_embeddings = true;
  double initializer_range = 0.02;
  std::vector<std::string> frozen;  // patterns over names of parameters
  Experts experts;
};

struct TrainSource {
  std::string path;
  double weight = 1.0;
};
struct ValidationSource {
  std::string name;
  std::string path;
};
struct Data {
  std::optional<std::string> tokenizer;
  std::vector<TrainSource> train;
  std::vector<ValidationSource> validation;
  bool shuffle = true;
  std::string documents = "joined";  // joined | separate
};

struct Batch {
  int64_t global_samples = 0;
  int64_t micro_samples = 0;
  int64_t sequence_length = 0;
};

struct LrSchedule {
  std::string kind = "cosine";   // constant | linear | cosine | wsd | inverse_sqrt
  int64_t warmup = 0;            // in the unit
  std::optional<int64_t> decay;  // auto
  std::string unit = "steps";    // steps | tokens
  double min_ratio = 0.1;
};

struct Checkpoint {
  std::optional<int64_t> interval_steps;  // none = only at the end and on a signal
  int64_t keep_last = 2;
  std::optional<int64_t> keep_every_steps;  // none
  bool asynchronous = true;
  std::string verify = "full";  // full | fast
};

struct Eval {
  std::optional<int64_t> interval_steps;  // none = only at the end
  std::optional<int64_t> samples = 64;    // sequences per set; no value = all
};

struct Trace {
  std::optional<int64_t> first_step;  // none
  int64_t steps = 3;
};
struct Metrics {
  int64_t interval_steps = 10;
  bool tensorboard = true;
  Trace trace;
};

struct Recipe {
  int64_t version = 1;
  Run run;
  Model model;
  Data data;
  Batch batch;
  Optimizer optimizer;
  LrSchedule lr_schedule;
  Precision precision;
  Parallel parallel;
  Checkpoint checkpoint;
  Eval eval;
  Metrics metrics;
};

}  // namespace capstan::recipe
