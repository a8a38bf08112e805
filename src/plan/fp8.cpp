// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/fp8.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "capstan/base/error.h"
#include "plan/llama_internal.h"
#include "plan/memory_internal.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

// cuBLASLt's fp8 products want sides in multiples of 16 bytes.
constexpr int64_t kSide = 16;
// Rows that the emulation multiplies at a time (ops/fp8.cpp).
constexpr int64_t kProductRows = 256;

struct Length {
  const char* key;
  std::string name;
  int64_t size, parts;
};

std::vector<Length> lengths_of(const Draft& draft, const ModelShape& shape) {
  const int64_t tensor = draft.recipe.parallel.tensor;
  const recipe::Batch& batch = draft.recipe.batch;
  const int64_t context = draft.recipe.parallel.context.size;
  const int64_t parts = context * (draft.recipe.parallel.sequence_overlap ? tensor : 1);
  return {{"model.hidden_size", "hidden_size", shape.hidden_size, 1},
          {"model.intermediate_size", "intermediate_size", shape.intermediate_size, tensor},
          {"model.num_attention_heads", "num_attention_heads x head_dim",
           shape.num_attention_heads * shape.head_dim, tensor},
          {"model.num_key_value_heads", "num_key_value_heads x head_dim",
           shape.num_key_value_heads * shape.head_dim, std::min(tensor, shape.num_key_value_heads)},
          {"batch.micro_samples", "micro_samples x sequence_length",
           saturating_multiply(batch.micro_samples, batch.sequence_length), parts}};
}

void check_lengths(Draft& draft, const ModelShape& shape) {
  for (const Length& side : lengths_of(draft, shape)) {
    if (side.size % (side.parts * kSide) == 0) continue;
    draft.refuse({side.key, fmt::format("{} = {}", side.name, side.size),
                  side.parts == 1
                      ? fmt::format("a multiple of {}", kSide)
                      : fmt::format("a multiple of {} on each of {} ranks", kSide, side.parts),
                  "sides of fp8 products are multiples of 16",
                  fmt::format("Nearest: {} {}; or set precision.fp8.scaling: none", side.name,
                              nearest_multiples(side.size, side.parts * kSide))});
  }
}

// Output and input features of a weight of this rank.
struct Sides {
  int64_t out, in;
};

// What the products of a layer hold beside their factors and result.
struct LayerProducts {
  explicit LayerProducts(const Plan& plan) {
    const ModelShape& shape = plan.model().shape;
    const Grid::Sizes& grid = plan.grid.sizes();
    const int64_t hidden = shape.hidden_size, ffn = shape.intermediate_size / grid.tp;
    const int64_t query = shape.num_attention_heads * shape.head_dim / grid.tp;
    const int64_t key_value =
        std::max<int64_t>(1, shape.num_key_value_heads / grid.tp) * shape.head_dim;
    qkv = {query + 2 * key_value, hidden};
    o = {hidden, query};
    gate_up = {(shape.family == "gpt2" ? 1 : 2) * ffn, hidden};
    down = {hidden, ffn};
    tokens = saturating_multiply(plan.batch.micro_samples, plan.batch.sequence_length / grid.cp);
    on_cpu = plan.resolved.run.device == "cpu";
    // While a factor is cast: with scales per row it is turned in bf16 first; the emulation turns
    // the result.
    casting = plan.resolved.precision.fp8.scaling == "row" ? 3 : on_cpu ? 2 : 1;
  }

  // dy^T x: both are cast, turned.
  [[nodiscard]] int64_t weight_gradient(const Sides& s) const {
    const int64_t first = saturating_multiply(tokens, s.out);
    const int64_t second = saturating_multiply(tokens, s.in);
    return std::max({saturating_multiply(casting, first),
                     first + saturating_multiply(casting, second),
                     first + second + widened(s.in, tokens, s.out)});
  }
  // dy W: casts of weights are kept.
  [[nodiscard]] int64_t input_gradient(const Sides& s) const {
    return saturating_multiply(tokens, s.out) + widened(s.in, s.out, tokens);
  }

  Sides qkv, o, gate_up, down;
  int64_t tokens = 0, casting = 1;
  bool on_cpu = false;

 private:
  // The emulation: the second factor [N, K], and some rows of the first and of the result, in fp32.
  [[nodiscard]] int64_t widened(int64_t n, int64_t k, int64_t rows) const {
    if (!on_cpu) return 0;
    const int64_t some = std::min(rows, kProductRows);
    return saturating_multiply(4, saturating_multiply(n, k) + some * (n + k));
  }
};

}  // namespace

bool uses_fp8(const recipe::Recipe& recipe) { return recipe.precision.fp8.scaling != "none"; }

void check_fp8(Draft& draft, const ModelShape& shape) {
  const recipe::Precision& precision = draft.recipe.precision;
  const recipe::Fp8& fp8 = precision.fp8;
  if (!uses_fp8(draft.recipe)) return;
  const char* key = "precision.fp8.scaling";
  if (precision.compute != "bf16")
    draft.refuse({"precision.compute", precision.compute, "bf16",
                  "precision.fp8.scaling is " + fp8.scaling +
                      ", and all but the linear layers stays in bf16",
                  "Set precision.compute: bf16, or precision.fp8.scaling: none"});
  if (shape.experts.count > 0)
    draft.refuse({key, fp8.scaling, "none",
                  "an expert gets any number of tokens, fp8 products want multiples of 16",
                  "Leave the key out"});
  if (draft.problems.empty()) check_lengths(draft, shape);
  draft.choices.push_back(
      fmt::format("precision.fp8: linear layers multiply in e4m3, gradients {}, scaling {}{}",
                  fp8.gradients, fp8.scaling,
                  draft.recipe.run.device == "cpu"
                      ? "; on cpu the rounding is emulated, which takes longer than bf16"
                      : ""));
}

std::vector<const ParamSpec*> fp8_weights(const ModelShape& shape,
                                          const std::vector<ParamSpec>& table) {
  std::vector<const ParamSpec*> weights;
  for (const ParamSpec& spec : table)
    if (spec.block > 0 && spec.block < shape.head_block() && spec.shape.size() == 2)
      weights.push_back(&spec);
  return weights;
}

bool keeps_fp8_weights(const recipe::Recipe& recipe) { return recipe.parallel.zero.stage < 3; }

int64_t fp8_kept_bytes(const Plan& plan, const RankLayout& layout) {
  if (!uses_fp8(plan.resolved) || !keeps_fp8_weights(plan.resolved)) return 0;
  const ModelShape& shape = plan.model().shape;
  const std::vector<ParamSpec>& table = plan.model().table();
  std::map<std::pair<int, int>, int64_t> joined;  // elements by block and fuse group
  int alone = -1;
  for (const FlatBuffer& buffer : layout.buffers)
    for (const LocalParam& param : buffer.params) {
      const ParamSpec& spec = table[static_cast<size_t>(param.spec)];
      const bool is_weight = spec.block > 0 && spec.block < shape.head_block() && !spec.wide;
      if (!is_weight || spec.shape.size() != 2) continue;
      joined[{spec.block, spec.fuse_group >= 0 ? spec.fuse_group : alone--}] += param.numel();
    }
  int64_t bytes = 0;
  for (const auto& [group, elements] : joined)
    bytes += 2 * allocation_bytes(elements, is_on_gpu(plan));
  return bytes;
}

void add_fp8_work(ActivationBytes& bytes, const Plan& plan) {
  if (!uses_fp8(plan.resolved)) return;
  using Part = ActivationTerm::Part;
  const LayerProducts of(plan);
  const std::pair<LayerPhase, int64_t> work[] = {
      {kDownWeight, of.weight_gradient(of.down)},
      {kDownInput, of.input_gradient(of.down)},
      {kGateUp, std::max(of.weight_gradient(of.gate_up), of.input_gradient(of.gate_up))},
      {kQkv, std::max(of.weight_gradient(of.qkv), of.input_gradient(of.qkv))}};
  for (const auto& [phase, size] : work)
    bytes.terms.push_back({.part = Part::kLayerWorkspace,
                           .phase = phase,
                           .name = "fp8 factors of a product",
                           .bytes = size});
  const std::string& family = plan.model().shape.family;
  if (family == "llama" || family == "gpt2") {
    bytes.layer_workspace =
        largest_phase(bytes.terms, Part::kLayerWorkspace, Part::kLayerWorkspace);
    bytes.split_layer_workspace = largest_phase(bytes.terms, Part::kLayerWorkspace, Part::kWaiting);
    return;
  }
  bytes.layer_workspace += fp8_work_bytes(plan);  // phases of other families are their own
  bytes.split_layer_workspace += fp8_work_bytes(plan);
}

int64_t fp8_work_bytes(const Plan& plan) {
  if (!uses_fp8(plan.resolved)) return 0;
  const LayerProducts of(plan);
  int64_t largest = 0;
  for (const Sides& sides : {of.qkv, of.o, of.gate_up, of.down})
    largest = std::max(largest, of.weight_gradient(sides));
  return largest;
}

void check_fp8_gpus(const recipe::Recipe& recipe, std::span<const Gpu> gpus) {
  if (!uses_fp8(recipe) || recipe.run.device != "cuda") return;
  for (const Gpu& gpu : gpus)
    if (gpu.major < 9)
      throw ConfigError(ErrorText{
          .module = "plan",
          .what = "multiplying in fp8 (precision.fp8.scaling)",
          .got = fmt::format("{} of compute capability {}.{}", gpu.name, gpu.major, gpu.minor),
          .need = "compute capability 9.0 or higher",
          .why = "its tensor cores multiply no fp8, or not by rows",
          .fix = "Set precision.fp8.scaling: none"});
}

}  // namespace capstan::plan
