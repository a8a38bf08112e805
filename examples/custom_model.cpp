// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A model of our own, trained under any layout without a line of parallel code: a decoder whose
// layers run attention and MLP side by side on one norm, with squared ReLU in place of a gate.
//   y = x + o(attend(q, k, v)) + down(relu(up)^2),   q, k, v, up = projections of norm(x)
// It is written twice, as every family: as data for the plan (parameters, FLOPs, activation bytes)
// and as blocks on nn::Seams. The program trains it on one rank and under other layouts, on ranks
// that are threads, prints the losses and fails when they or what the ranks sent are not as
// promised. Needs no files.
// Legend: B samples, T tokens, D hidden, F MLP features, N query heads, K key/value heads, H head
// size, X = (N + 2K) H, V vocabulary.
#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <mutex>

#include "capstan/comm/threads.h"
#include "capstan/device/allocator.h"
#include "capstan/engine/engine.h"
#include "capstan/ops/norm.h"
#include "capstan/trainer/prove.h"

namespace {

using namespace capstan;
using at::Tensor;

constexpr const char* kFamily = "parallel_decoder";

// ---- The family as data ----

using Kind = plan::ShardRule::Kind;
const plan::ShardRule kReplicate{};
const plan::ShardRule kByOutput{.kind = Kind::kSplit, .dim = 0};  // a column projection
const plan::ShardRule kByInput{.kind = Kind::kSplit, .dim = 1};   // a row projection

plan::ParamSpec matrix(int block, const std::string& name, const plan::Shape& dims,
                       const plan::ShardRule& tensor, double deviation) {
  plan::ParamSpec spec;
  spec.name = name;
  spec.shape = dims;
  spec.block = block;
  spec.init = {plan::Init::Kind::kNormal, deviation};
  spec.tensor = tensor;
  // It acts on features that the tensor axis splits; what acts on the residual stream (norms)
  // keeps kResidual. The layout derives from this over which ranks a gradient is summed.
  if (tensor.kind == Kind::kSplit) spec.site = plan::Site::kSplit;
  return spec;
}

plan::ParamSpec norm(int block, const std::string& name, int64_t size) {
  plan::ParamSpec spec = matrix(block, name, {size}, kReplicate, 0);
  spec.init.kind = plan::Init::Kind::kOnes;
  spec.decay = false;
  return spec;
}

void add_layer(std::vector<plan::ParamSpec>& table, const plan::ModelShape& shape, int index) {
  const int block = index + 1;
  const std::string prefix = "layers." + std::to_string(index) + ".";
  const int64_t hidden = shape.hidden_size, query = shape.num_attention_heads * shape.head_dim,
                key_value = shape.num_key_value_heads * shape.head_dim;
  plan::ShardRule heads = kByOutput;
  heads.units = shape.num_key_value_heads;  // a head is never cut; fewer heads than ranks: copied
  const auto add = [&](const char* name, const plan::Shape& dims, const plan::ShardRule& tensor) {
    return &table.emplace_back(matrix(block, prefix + name, dims, tensor, shape.initializer_range));
  };
  table.push_back(norm(block, prefix + "norm.weight", hidden));
  // One fuse group: they lie side by side and are one call of Seams::column, which the plan counts.
  add("attn.q.weight", {query, hidden}, kByOutput)->fuse_group = 0;
  add("attn.k.weight", {key_value, hidden}, heads)->fuse_group = 0;
  add("attn.v.weight", {key_value, hidden}, heads)->fuse_group = 0;
  add("mlp.up.weight", {shape.intermediate_size, hidden}, kByOutput)->fuse_group = 0;
  add("attn.o.weight", {hidden, query}, kByInput);
  add("mlp.down.weight", {hidden, shape.intermediate_size}, kByInput);
}

std::vector<plan::ParamSpec> param_table(const plan::ModelShape& shape) {
  const plan::ShardRule vocabulary{.kind = Kind::kVocab};
  const plan::Shape dims = {shape.vocab_size, shape.hidden_size};
  std::vector<plan::ParamSpec> table = {
      matrix(0, "embed.weight", dims, vocabulary, shape.initializer_range)};
  for (int i = 0; i < shape.num_hidden_layers; ++i) add_layer(table, shape, i);
  const int head = shape.head_block();
  table.push_back(norm(head, "norm.weight", shape.hidden_size));
  if (!shape.tie_word_embeddings)
    table.push_back(matrix(head, "lm_head.weight", dims, vocabulary, shape.initializer_range));
  return table;
}

// As Llama, without the gate.
plan::ForwardFlops forward_flops(const plan::ModelShape& shape, int64_t sequence_length) {
  plan::ForwardFlops flops = plan::find_family("llama").forward_flops(shape, sequence_length);
  flops.linear -= 2.0 * static_cast<double>(shape.num_hidden_layers) *
                  static_cast<double>(shape.hidden_size) *
                  static_cast<double>(shape.intermediate_size);
  return flops;
}

// As Llama, less what the second norm and the gate keep, and with one more temporary in the
// backward of the square.
plan::ActivationBytes activation_bytes(const plan::ModelShape& shape,
                                       const plan::ActivationQuery& query) {
  using Part = plan::ActivationTerm::Part;
  plan::ActivationBytes bytes = plan::find_family("llama").activation_bytes(shape, query);
  const int64_t kept = query.kept_tokens > 0 ? query.kept_tokens : query.tokens;
  const auto size = [](int64_t elements, DType dtype) {
    return plan::allocation_bytes(elements * static_cast<int64_t>(size_of(dtype)));
  };
  const int64_t norm = size(kept * shape.hidden_size, query.compute),
                residual = size(kept * shape.hidden_size, query.residual),
                mlp = size(query.tokens * shape.intermediate_size, query.compute);
  const auto change = [&](Part part, int64_t& sum, const char* name, int64_t by) {
    sum += by;
    bytes.terms.push_back({.part = part, .name = name, .bytes = by});
  };
  change(Part::kLayer, bytes.saved_per_layer, "no second norm", -norm - residual);
  change(Part::kLayer, bytes.saved_per_layer, "no gate", -mlp);
  change(Part::kWeightWork, bytes.weight_work, "no second norm", -norm);
  change(Part::kWeightWork, bytes.weight_work, "no gate", -mlp);
  change(Part::kLayerWorkspace, bytes.layer_workspace, "gradient of the square", mlp);
  return bytes;
}

// ---- The blocks ----

struct TokenEmbedding final : nn::Embedding {
  param::Param table_VD;
  at::ScalarType residual;

  nn::BlockIO forward(const nn::Context& context, nn::Seams& seams,
                      const Tensor& ids_BT) const override {
    nn::BlockIO out;
    out.residual_BTD = seams.embed(context, ids_BT, table_VD, residual);
    return out;
  }
};

struct ParallelLayer final : nn::Block {
  int index = 0;
  double eps = 0;
  nn::AttentionInput attention;  // of the whole model
  param::Param norm_D;
  nn::Projection qkv, up, o, down;

  nn::BlockIO forward(const nn::Context& context, nn::Seams& seams,
                      const nn::BlockIO& in) const override {
    const auto normed = ops::add_rms_norm(in.residual_BTD, in.hidden_BTD, norm_D, eps);
    const nn::Projection inner[] = {qkv, up};
    const std::vector<Tensor> parts = seams.column(context, normed.normed, inner);
    const Tensor attended_BTD =
        seams.row(context, seams.attend(context, index, parts[0], local_attention()), o);
    // Between the seams any differentiable ATen operation will do.
    const Tensor mlp_BTD = seams.row(context, at::relu(parts[1]).square(), down);
    nn::BlockIO out;
    out.hidden_BTD = attended_BTD + mlp_BTD;
    out.residual_BTD = normed.residual;
    return out;
  }

  // This rank's heads follow from the weights that it holds.
  nn::AttentionInput local_attention() const {
    nn::AttentionInput local = attention;
    local.query_heads = qkv.parts[0].local().local_shape[0] / attention.head_size;
    local.key_value_heads = qkv.parts[1].local().local_shape[0] / attention.head_size;
    return local;
  }
};

struct LanguageHead final : nn::Head {
  double eps = 0;
  param::Param norm_D;
  nn::Projection head;

  nn::TokenScores score(const nn::Context& context, nn::Seams& seams, const nn::BlockIO& in,
                        const Tensor& targets_BT, const nn::ScoreRequest& request) const override {
    const auto last = ops::add_rms_norm(in.residual_BTD, in.hidden_BTD, norm_D, eps);
    return seams.score(context, last.normed, head, targets_BT, request);
  }
  Tensor logits(const nn::Context& context, nn::Seams& seams, const nn::BlockIO& in,
                int64_t count) const override {
    const auto last = ops::add_rms_norm(in.residual_BTD, in.hidden_BTD, norm_D, eps);
    return seams.logits(context, seams.last_tokens(context, last.normed, count), head);
  }
};

std::unique_ptr<nn::Block> build_layer(const plan::ModelShape& shape, int index,
                                       const nn::FindParam& find) {
  const auto weight = [&](const std::string& name) {
    return find("layers." + std::to_string(index) + "." + name + ".weight");
  };
  auto layer = std::make_unique<ParallelLayer>();
  layer->index = index;
  layer->eps = shape.rms_norm_eps;
  layer->attention = {.query_heads = shape.num_attention_heads,
                      .key_value_heads = shape.num_key_value_heads,
                      .head_size = shape.head_dim,
                      .rope_theta = shape.rope_theta,
                      .max_positions = shape.max_position_embeddings,
                      .spec = {.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim)),
                               .sliding_window = shape.sliding_window}};
  layer->norm_D = weight("norm");
  layer->qkv = {.parts = {weight("attn.q"), weight("attn.k"), weight("attn.v")}, .bias = {}};
  layer->up = {.parts = {weight("mlp.up")}, .bias = {}};
  layer->o = {.parts = {weight("attn.o")}, .bias = {}};
  layer->down = {.parts = {weight("mlp.down")}, .bias = {}};
  return layer;
}

nn::Model build(const plan::ModelShape& shape, const nn::ModelOptions& options,
                const nn::FindParam& find) {
  nn::Model model;
  model.shape = shape;
  auto embedding = std::make_unique<TokenEmbedding>();
  embedding->table_VD = find("embed.weight");
  embedding->residual = options.residual;
  model.embedding = std::move(embedding);
  for (int i = 0; i < shape.num_hidden_layers; ++i)
    model.layers.push_back(build_layer(shape, i, find));
  auto head = std::make_unique<LanguageHead>();
  head->eps = shape.rms_norm_eps;
  head->norm_D = find("norm.weight");
  head->head.parts = {find(shape.tie_word_embeddings ? "embed.weight" : "lm_head.weight")};
  model.head = std::move(head);
  return model;
}

// ---- Training ----

constexpr const char* kRecipe =
    "version: 1\n"
    "run: {name: custom-model, steps: 5, threads: 1}\n"
    "model: {family: parallel_decoder, vocab_size: 61, hidden_size: 32, intermediate_size: 48, "
    "num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2, initializer_range: "
    "0.15}\n"
    "data: {tokenizer: unused, train: [{path: unused}]}\n"
    "batch: {global_samples: 8, micro_samples: 1, sequence_length: 32}\n"
    "optimizer: {lr: 1.0e-2}\n"
    "precision: {compute: fp64}\n";

struct Layout {
  const char* name;
  int ranks;
  std::vector<std::string> overrides;
};
const std::vector<Layout>& layouts() {
  static const std::vector<Layout> table = {
      {"one rank", 1, {}},
      {"tensor 2, sequence", 2, {"parallel.tensor=2", "parallel.sequence=true"}},
      {"tensor 4, key/value heads copied", 4, {"parallel.tensor=4"}},
      {"pipeline 2, zero bubble",
       2,
       {"parallel.pipeline.size=2", "parallel.pipeline.schedule=zero_bubble"}},
      {"ZeRO 3 over 2", 2, {"parallel.zero.stage=3"}},
      {"context 2, recompute", 2, {"parallel.context.size=2", "parallel.recompute.mode=block"}},
      {"tensor 2, sequence, pipeline 2, ZeRO 3 over 2",
       8,
       {"parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline.size=2",
        "parallel.pipeline.schedule=1f1b", "parallel.zero.stage=3"}}};
  return table;
}

// Row s counts up from a start of its own; every rank takes its share of the step's rows.
engine::MicroBatch make_rows(int64_t first_sample, const plan::BatchPlan& b) {
  const Tensor start =
      (at::arange(first_sample, first_sample + b.micro_samples, at::kLong) * 7).unsqueeze(1);
  const Tensor row = (start + at::arange(b.sequence_length + 1, at::kLong)).remainder(61);
  engine::MicroBatch batch;
  batch.ids_BT = row.narrow(1, 0, b.sequence_length).contiguous();
  batch.targets_BT = row.narrow(1, 1, b.sequence_length).contiguous();
  batch.rows.positions_BT = at::arange(b.sequence_length, at::kLong)
                                .expand({b.micro_samples, b.sequence_length})
                                .contiguous();
  for (int64_t s = 0; s < b.micro_samples; ++s) batch.rows.samples.push_back(first_sample + s);
  return batch;
}

bool sent_as_planned(const comm::Communicator& world, const plan::Plan& plan) {
  auto sent = world.ledger().table();
  std::erase_if(sent, [](const auto& entry) { return entry.first.starts_with("control/"); });
  const plan::Traffic planned = plan::predict_traffic(plan, world.rank());
  return std::equal(sent.begin(), sent.end(), planned.begin(), planned.end(),
                    [](const auto& a, const auto& b) {
                      return a.first == b.first && a.second.calls == b.second.calls &&
                             a.second.bytes == b.second.bytes;
                    });
}

struct Run {
  std::vector<double> losses;  // of every step
  bool traffic_as_planned = true;
};
Run train(const Layout& layout) {
  const plan::Plan plan =
      plan::make_plan(recipe::parse_recipe(kRecipe, "custom_model", layout.overrides),
                      plan::local_topology(layout.ranks, layout.ranks, "cpu"), {});
  Run run;
  std::mutex mutex;
  comm::run_thread_ranks(layout.ranks, [&](const comm::Communicator& world) {
    mesh::Mesh mesh(world, plan.grid);
    engine::Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    const plan::BatchPlan& b = plan.batch;
    for (int64_t step = 0; step < b.total_steps; ++step) {
      const int64_t mine = step * b.global_samples +
                           mesh.grid().data_parallel_index(mesh.rank()) * b.samples_per_rank;
      std::vector<engine::MicroBatch> batches;
      for (int64_t m = 0; m < b.micro_batches; ++m)
        batches.push_back(make_rows(mine + m * b.micro_samples, b));
      world.ledger().reset();
      const double loss = engine.step(batches, *objective).loss;
      const bool as_planned = sent_as_planned(world, plan);
      const std::lock_guard lock(mutex);
      if (world.rank() == 0) run.losses.push_back(loss);
      run.traffic_as_planned = run.traffic_as_planned && as_planned;
    }
  });
  return run;
}

// Every weight and moment of a layout against one rank, as `capstan prove` does it.
bool prove(const Layout& layout) {
  trainer::ProveOptions options;
  options.recipe = recipe::parse_recipe(kRecipe, "custom_model", layout.overrides);
  options.world = layout.ranks;
  const trainer::ProveReport report = trainer::prove(options);
  std::printf("%s: every weight within %.1e of one rank\n", report.layout.c_str(), report.error);
  if (report.first) std::printf("%s\n", trainer::describe(*report.first, report.bar).c_str());
  return report.is_proven();
}

int compare_layouts() {
  Run one;
  bool good = true;
  for (const Layout& layout : layouts()) {
    const Run run = train(layout);
    if (one.losses.empty()) one = run;
    double error = 0;
    for (size_t step = 0; step < run.losses.size(); ++step)
      error = std::max(error, std::fabs(run.losses[step] - one.losses[step]));
    std::printf("%-46s %d ranks  loss", layout.name, layout.ranks);
    for (const double loss : run.losses) std::printf(" %.6f", loss);
    std::printf("  error %.1e  traffic %s\n", error,
                run.traffic_as_planned ? "as planned" : "NOT as planned");
    good = good && error <= 1e-9 && run.traffic_as_planned && run.losses.back() < run.losses[0];
  }
  good = prove(layouts().back()) && good;
  std::printf(good ? "all layouts compute the same run\n" : "layouts differ\n");
  return good ? 0 : 1;
}

}  // namespace

int main() {
  device::install_cpu_allocator();
  // Before the first recipe is read. A family without a Hugging Face type is written as
  // "capstan_parallel_decoder" in config.json.
  plan::register_family({.name = kFamily,
                         .param_table = param_table,
                         .forward_flops = forward_flops,
                         .activation_bytes = activation_bytes,
                         .hf_architecture = "ParallelDecoderForCausalLM",
                         .hf_model_type = ""});
  nn::register_builder(kFamily, build);
  try {
    return compare_layouts();
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.run_exit_code();
  }
}
