// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Every key of the recipe, in the order of the documentation. Adding a key is adding a field to
// recipe.h and an entry here. KEY(a.b, "doc") is named after the field it is bound to.
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

#define KEY(member, doc) \
  Key(                   \
      #member, [](Recipe& recipe, size_t) -> Field { return &recipe.member; }, doc)
#define ITEM(list, member, doc) \
  Key(                          \
      #list "[]." #member,      \
      [](Recipe& recipe, size_t index) -> Field { return &recipe.list[index].member; }, doc)

// Ceilings keep products of sizes inside 64 bits; no real model comes near them.
constexpr double kManySteps = 1e12, kManyTokens = 1e18, kManySamples = 1e9, kManyRanks = 65536;
constexpr double kWide = 1 << 20, kLongest = 1 << 26, kManyWords = 1 << 26;

void add_run_keys(std::vector<Key>& t) {
  t.push_back(KEY(version, "Format of this file.").required().range(1, 1));
  t.push_back(KEY(run.name, "Name of the run; also of its folder.").required().name(false));
  t.push_back(KEY(run.directory, "Run directory; auto = `runs/<name>` under the working directory.")
                  .word("auto")
                  .free());
  t.push_back(KEY(run.steps, "Optimizer steps of the run. Exactly one of steps, tokens.")
                  .word("none")
                  .range(1, kManySteps)
                  .unit("steps")
                  .free());
  t.push_back(KEY(run.tokens, "Tokens of the run; it ends with the step that reaches them.")
                  .word("none")
                  .range(1, kManyTokens)
                  .unit("tokens")
                  .free());
  t.push_back(KEY(run.seed, "Decides model start, data order and dropout.").at_least(0));
  t.push_back(KEY(run.device, "auto = cuda if a usable GPU is found, else cpu.").choice());
  t.push_back(KEY(run.threads,
                  "CPU threads per rank; auto = physical cores allowed / local ranks, "
                  "at least 1.")
                  .word("auto")
                  .range(1, 4096)
                  .free());
  t.push_back(KEY(run.deterministic,
                  "cuda: the same bits twice at some cost; cpu runs always repeat "
                  "bit for bit."));
  t.push_back(KEY(run.graphs,
                  "cuda: steps are recorded and launched as graphs; nothing offloaded, experts "
                  "in bf16.")
                  .free());
  t.push_back(KEY(run.gemm,
                  "cuda: who multiplies in linear layers. libtorch = LibTorch's calls; cublaslt = "
                  "cuBLASLt with the algorithm that was measured to be the fastest; auto = "
                  "whichever was measured to be faster.")
                  .choice()
                  .free());
  t.push_back(KEY(run.start_timeout_s, "Deadline of waits before the first finished step.")
                  .above(0)
                  .unit("s")
                  .free());
  t.push_back(
      KEY(run.step_timeout_s, "Deadline of every wait after it.").above(0).unit("s").free());
}

void add_model_keys(std::vector<Key>& t) {
  t.push_back(KEY(model.from, "Hugging Face folder that gives shape and weights.")
                  .word("none")
                  .later("starting from a Hugging Face model"));
  t.push_back(KEY(model.family,
                  "Architecture. llama is also what Mistral, Qwen2 and Qwen3 compute, by the keys "
                  "of attention.")
                  .choice());
  t.push_back(KEY(model.vocab_size,
                  "Size of the vocabulary; auto = size of data.tokenizer. Padding of "
                  "storage is not part of the model.")
                  .word("auto")
                  .range(1, kManyWords));
  t.push_back(KEY(model.hidden_size, "Width of the residual stream.").required().range(1, kWide));
  t.push_back(
      KEY(model.intermediate_size, "Width of the feed-forward layer.").required().range(1, kWide));
  t.push_back(KEY(model.num_hidden_layers, "Transformer layers.").required().range(1, 4096));
  t.push_back(KEY(model.num_attention_heads, "Query heads.").required().range(1, 4096));
  t.push_back(KEY(model.num_key_value_heads, "Key and value heads; auto = num_attention_heads.")
                  .word("auto")
                  .range(1, 4096));
  t.push_back(KEY(model.head_dim, "Width of a head; auto = hidden_size / num_attention_heads.")
                  .word("auto")
                  .range(1, 65536));
  t.push_back(KEY(model.max_position_embeddings,
                  "Longest sequence the model is meant for; auto = "
                  "batch.sequence_length.")
                  .word("auto")
                  .range(1, kLongest));
  t.push_back(KEY(model.hidden_act, "Activation of the feed-forward layer.").choice());
  t.push_back(KEY(model.rms_norm_eps, "Added to the mean square in RMSNorm.").above(0));
  t.push_back(KEY(model.layer_norm_eps, "Added to the variance in LayerNorm; gpt2 only.").above(0));
  t.push_back(KEY(model.rope_theta, "Base of the rotary position angles.").above(0));
  t.push_back(KEY(model.rope_scaling.rope_type, "How rotary angles are scaled.").choice());
  t.push_back(KEY(model.sliding_window,
                  "Number of keys a position sees, its own included; none = all "
                  "before it.")
                  .word("none")
                  .range(1, kLongest));
  t.push_back(KEY(model.attention_bias, "Biases on the query, key and value projections."));
  t.push_back(KEY(model.attention_output_bias,
                  "Bias on the output projection of attention; left out, as attention_bias."));
  t.push_back(KEY(model.qk_norm,
                  "RMSNorm of each query and key head before the rotary positions, with "
                  "rms_norm_eps."));
  t.push_back(KEY(model.tie_word_embeddings, "One matrix serves as embedding and as output head."));
  t.push_back(KEY(model.initializer_range, "Standard deviation of the initial weights.").above(0));
  t.push_back(KEY(model.frozen,
                  "Parameters that are not trained: patterns over their names, * for any run of "
                  "characters; ! in front trains what it matches again; the last match decides."));
}

void add_expert_keys(std::vector<Key>& t) {
  t.push_back(KEY(model.experts.count,
                  "Experts in the place of every feed-forward layer; families mixtral and moe. "
                  "0 = none.")
                  .range(0, 4096));
  t.push_back(KEY(model.experts.per_token, "Experts chosen for a token.").range(1, 256));
  t.push_back(
      KEY(model.experts.intermediate_size, "Width of one expert; auto = model.intermediate_size.")
          .word("auto")
          .range(1, kWide));
  t.push_back(KEY(model.experts.shared_intermediate_size,
                  "Width of the expert that sees every token; 0 = there is none.")
                  .range(0, kWide));
  t.push_back(KEY(model.experts.shared_gate,
                  "The shared expert's output is scaled by the sigmoid of a learned product."));
  t.push_back(KEY(model.experts.router, "Scores of the experts from their logits.").choice());
  t.push_back(KEY(model.experts.normalize_weights,
                  "The weights of a token's experts are scaled to sum 1."));
  t.push_back(KEY(model.experts.groups, "Groups of consecutive experts for a limited choice.")
                  .range(1, 4096));
  t.push_back(KEY(model.experts.groups_per_token,
                  "Groups that a token may choose from: those whose best two scores have the "
                  "largest sums.")
                  .range(1, 4096));
  t.push_back(KEY(model.experts.scaling, "Factor of the experts' weights.").above(0));
  t.push_back(KEY(model.experts.auxiliary_loss,
                  "Coefficient of the load-balancing loss of each layer; 0 = off.")
                  .at_least(0));
  t.push_back(KEY(model.experts.auxiliary_scope,
                  "Where the loss takes the load from; sequence: the same row; global: the whole "
                  "batch of the previous step.")
                  .choice());
  t.push_back(KEY(model.experts.z_loss,
                  "Coefficient of the squared log-sum-exp of the router's logits; 0 = off.")
                  .at_least(0));
  t.push_back(KEY(model.experts.bias_update_rate,
                  "What a step adds to or takes from the bias of an expert with less or more than "
                  "its share of the load; the bias acts on the choice alone; 0 = off.")
                  .at_least(0));
  t.push_back(KEY(model.experts.capacity_factor,
                  "Tokens of a row beyond this times an expert's even share pass it by; none = no "
                  "token is dropped.")
                  .word("none")
                  .above(0));
}

void add_data_keys(std::vector<Key>& t) {
  t.push_back(KEY(data.tokenizer, "Folder with tokenizer.json; none needs model.vocab_size.")
                  .required()
                  .word("none"));
  t.push_back(KEY(data.train, "Training sets, mixed by weight.").required().at_least_one());
  t.push_back(ITEM(data.train, path, "Prefix of a .bin/.idx pair.").required());
  t.push_back(
      ITEM(data.train, weight, "Share of the samples, relative to the other sets.").above(0));
  t.push_back(KEY(data.validation, "Held-out sets, evaluated apart."));
  t.push_back(
      ITEM(data.validation, name, "Name in metrics; must be unique.").required().name(true));
  t.push_back(ITEM(data.validation, path, "Prefix of a .bin/.idx pair.").required());
  t.push_back(KEY(data.shuffle, "false = samples in file order."));
  t.push_back(KEY(data.documents,
                  "joined: attention and positions cross a document boundary; separate: "
                  "neither does.")
                  .choice());
  t.push_back(KEY(batch.global_samples, "Sequences per optimizer step over all ranks.")
                  .required()
                  .range(1, kManySamples)
                  .unit("samples"));
  t.push_back(KEY(batch.micro_samples, "Sequences per forward pass of one rank.")
                  .required()
                  .range(1, kManySamples)
                  .unit("samples")
                  .free());
  t.push_back(KEY(batch.sequence_length, "Tokens per sequence.")
                  .required()
                  .range(1, kLongest)
                  .unit("tokens"));
}

void add_optimizer_keys(std::vector<Key>& t) {
  t.push_back(
      KEY(optimizer.name,
          "Update rule. lion has one moment and wants a learning rate 3 to 10 times smaller "
          "than adamw's, with weight_decay as many times larger; sophia divides its moment by "
          "an estimate of the curvature, with betas [0.965, 0.99].")
          .choice());
  t.push_back(KEY(optimizer.moments,
                  "Type of the moments; auto = that of the master weights. bf16: rounded "
                  "stochastically. int8: 8 bits in blocks of 256 elements; parameters "
                  "under 4096 elements, with rows of no whole blocks, and the embedding keep auto.")
                  .choice());
  t.push_back(KEY(optimizer.lr, "Peak learning rate.").required().above(0));
  t.push_back(
      KEY(optimizer.betas,
          "Decay rates of the two moments; with lion of the direction and of its moment, with "
          "sophia of moment and curvature.")
          .count(2)
          .half_open(0, 1));
  t.push_back(KEY(optimizer.eps, "Added to the root of the second moment; adamw only.").above(0));
  t.push_back(KEY(optimizer.weight_decay, "Decoupled decay; not on norms and biases.").at_least(0));
  t.push_back(KEY(optimizer.max_grad_norm,
                  "Gradients with a larger global norm are scaled down to it; "
                  "none = no clipping.")
                  .word("none")
                  .above(0));
  t.push_back(
      KEY(optimizer.nonfinite_limit, "This many skipped steps in a row end the run with exit 93.")
          .range(1, kManySteps)
          .unit("steps"));
  t.push_back(KEY(optimizer.spike_skip.sigma,
                  "Skip a step whose loss or gradient norm is this many "
                  "deviations above the window; none = off.")
                  .word("none")
                  .above(0));
  t.push_back(KEY(optimizer.spike_skip.window, "Steps the mean and deviation are taken over.")
                  .range(2, 1e6)
                  .unit("steps"));
  t.push_back(KEY(optimizer.sophia.rho,
                  "sophia: the curvature times this divides the moment; weights whose quotient is "
                  "above 1 move by lr. Larger = fewer of them.")
                  .above(0));
  t.push_back(KEY(optimizer.sophia.interval,
                  "sophia: the curvature is estimated every this many steps, by one more pass on "
                  "labels drawn from the model's own predictions.")
                  .range(1, kManySteps)
                  .unit("steps"));
  t.push_back(KEY(optimizer.in_backward,
                  "Update each block as soon as its gradient is complete and reuse the gradient's "
                  "memory: never a whole gradient. One micro-batch a step, max_grad_norm none; a "
                  "non-finite gradient ends the run.")
                  .free());
  t.push_back(KEY(lr_schedule.kind, "Shape of the learning rate over the run.").choice());
  t.push_back(
      KEY(lr_schedule.warmup, "Length of the linear rise at the start, in lr_schedule.unit.")
          .range(0, kManyTokens));
  t.push_back(KEY(lr_schedule.decay,
                  "Length of the fall, in lr_schedule.unit; auto = to the end of the run; "
                  "wsd: length of the last phase, required there.")
                  .word("auto")
                  .range(1, kManyTokens));
  t.push_back(KEY(lr_schedule.unit, "What warmup and decay count.").choice());
  t.push_back(KEY(lr_schedule.min_ratio, "Last learning rate / peak.").range(0, 1));
}

void add_precision_keys(std::vector<Key>& t) {
  t.push_back(KEY(precision.compute,
                  "Type of weights and activations in products; auto = bf16 with "
                  "AVX512-BF16, AMX or sm_80 up, else fp32.")
                  .choice());
  t.push_back(KEY(precision.residual,
                  "Type of the residual stream; auto = fp32 on cpu (fp64 with fp64), the "
                  "compute type on cuda.")
                  .choice());
  t.push_back(KEY(precision.master, "Type of the optimizer's weights; fp64 when compute is fp64.")
                  .choice());
  t.push_back(KEY(precision.gradients,
                  "Type in which gradients are accumulated; fp64 when compute is fp64.")
                  .choice());
  t.push_back(KEY(precision.reduction,
                  "Type in which gradients travel between data-parallel ranks and the stages of a "
                  "tied embedding; auto = gradients.")
                  .choice());
  t.push_back(KEY(precision.keep_fp32,
                  "Parameters whose values stay in the master's type, and whose ops work in it: "
                  "patterns over their names as for model.frozen."));
  t.push_back(
      KEY(precision.fp8.scaling,
          "Products of the linear layers in fp8: none, or what has a scale of its own: a "
          "tensor, a row; delayed = a tensor, by the maxima of earlier steps. Emulated, and "
          "slow, on cpu.")
          .choice());
  t.push_back(
      KEY(precision.fp8.gradients, "Format of gradients in them; the rest is e4m3.").choice());
  t.push_back(KEY(precision.fp8.history, "Delayed scaling: steps the maximum is taken over.")
                  .range(1, 4096)
                  .unit("steps"));
  t.push_back(
      KEY(precision.loss_scale, "fp16 only: a fixed scale, or dynamic.").word("dynamic").above(0));
}

void add_parallel_keys(std::vector<Key>& t) {
  t.push_back(
      KEY(parallel.data, "Data-parallel ranks; auto = world size / (tensor x pipeline x context).")
          .word("auto")
          .range(1, kManyRanks)
          .unit("ranks")
          .free());
  t.push_back(
      KEY(parallel.tensor, "Tensor-parallel ranks.").range(1, kManyRanks).unit("ranks").free());
  t.push_back(
      KEY(parallel.sequence, "Split norms and residual along the sequence; needs tensor > 1.")
          .free());
  t.push_back(KEY(parallel.sequence_overlap,
                  "Gathers and sums of parallel.sequence go round the tensor ranks part by part, "
                  "each travelling while the part before it is multiplied.")
                  .free());
  t.push_back(
      KEY(parallel.pipeline.size, "Pipeline stages.").range(1, kManyRanks).unit("ranks").free());
  t.push_back(KEY(parallel.pipeline.schedule, "Order of the micro-batches.").choice().free());
  t.push_back(KEY(parallel.pipeline.chunks, "Stages per rank.").range(1, 4096).free());
  t.push_back(KEY(parallel.pipeline.split, "Layers of each stage; auto = as even as possible.")
                  .word("auto")
                  .range(0, 4096)
                  .free());
  t.push_back(KEY(parallel.context.size, "Ranks that share one sequence.")
                  .range(1, kManyRanks)
                  .unit("ranks")
                  .free());
  t.push_back(KEY(parallel.context.method, "How keys and values travel.").choice().free());
  t.push_back(
      KEY(parallel.expert, "Expert-parallel ranks.").range(1, kManyRanks).unit("ranks").free());
  t.push_back(KEY(parallel.zero.stage,
                  "0: copies on every rank; 1, 2, 3: optimizer, gradients, parameters "
                  "are sharded.")
                  .range(0, 3)
                  .free());
  t.push_back(
      KEY(parallel.zero.shard_size, "Ranks that share one copy; auto = all data-parallel ranks.")
          .word("auto")
          .range(1, kManyRanks)
          .unit("ranks")
          .free());
  t.push_back(KEY(parallel.zero.reduce,
                  "When gradients are reduced; auto = step for stages 0 and 1, else "
                  "micro_batch.")
                  .choice()
                  .free());
  t.push_back(
      KEY(parallel.zero.reshard_after_forward, "Stage 3: drop gathered weights after the forward.")
          .free());
  t.push_back(
      KEY(parallel.zero.prefetch, "Stage 3: blocks whose weights are gathered ahead of their use.")
          .range(0, 64)
          .unit("blocks")
          .free());
  t.push_back(KEY(parallel.zero.offload, "What is kept in host memory.").choice().free());
  t.push_back(KEY(parallel.recompute.mode, "What the backward computes again.").choice().free());
  t.push_back(KEY(parallel.recompute.parts,
                  "Mode selective: parts of a layer that keep only their input. norm: made again "
                  "from the residual stream.")
                  .choice()
                  .free());
  t.push_back(KEY(parallel.offload_activations,
                  "What layers keep for the backward waits in host memory; on cpu ranks that saves "
                  "nothing.")
                  .free());
  t.push_back(
      KEY(parallel.bucket_mib, "Size of a gradient bucket.").range(1, 65536).unit("MiB").free());
}

void add_output_keys(std::vector<Key>& t) {
  t.push_back(
      KEY(checkpoint.interval_steps, "Steps between saves; none = only at the end and on a signal.")
          .word("none")
          .range(1, kManySteps)
          .unit("steps")
          .free());
  t.push_back(
      KEY(checkpoint.keep_last, "Committed checkpoints kept; the newest good one is never removed.")
          .range(1, 1e6)
          .free());
  t.push_back(KEY(checkpoint.keep_every_steps, "Checkpoints of these steps are kept for ever.")
                  .word("none")
                  .range(1, kManySteps)
                  .unit("steps")
                  .free());
  t.push_back(KEY(checkpoint.asynchronous, "Write while training goes on.").free());
  t.push_back(KEY(checkpoint.verify, "Check on load; full: every hash; fast: sizes and manifest.")
                  .choice()
                  .free());
  t.push_back(KEY(eval.interval_steps, "Steps between evaluations; none = only at the end.")
                  .word("none")
                  .range(1, kManySteps)
                  .unit("steps")
                  .free());
  t.push_back(KEY(eval.samples, "Sequences per validation set; all = the whole set.")
                  .word("all")
                  .range(1, kManySamples)
                  .unit("samples")
                  .free());
  t.push_back(KEY(metrics.interval_steps,
                  "Steps between step lines, metrics.jsonl and TensorBoard records.")
                  .range(1, kManySteps)
                  .unit("steps")
                  .free());
  t.push_back(KEY(metrics.tensorboard, "Write TensorBoard event files.").free());
  t.push_back(KEY(metrics.trace.first_step, "First step of a Chrome trace; none = no trace.")
                  .word("none")
                  .range(1, kManySteps)
                  .free());
  t.push_back(KEY(metrics.trace.steps, "Steps in the trace.").range(1, 10000).unit("steps").free());
}

std::vector<Key> build_table() {
  std::vector<Key> table;
  add_run_keys(table);
  add_model_keys(table);
  add_expert_keys(table);
  add_data_keys(table);
  add_optimizer_keys(table);
  add_precision_keys(table);
  add_parallel_keys(table);
  add_output_keys(table);
  return table;
}

}  // namespace

const std::vector<Key>& keys() {
  static const std::vector<Key> table = build_table();
  return table;
}

}  // namespace capstan::recipe
