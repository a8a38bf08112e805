// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Model families as data: the parameter table, FLOPs, activation bytes and Hugging Face names of a
// shape. A family is a value in a registry, so users add their own. Torch-free; the layers
// themselves live in nn.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "capstan/base/dtype.h"
#include "capstan/plan/recompute.h"
#include "capstan/plan/shape.h"

namespace capstan::plan {

using Shape = std::vector<int64_t>;
[[nodiscard]] int64_t numel(const Shape& shape);

struct Init {
  enum class Kind { kZeros, kOnes, kNormal };
  Kind kind = Kind::kNormal;
  double deviation = 0.02;  // kNormal
};

// How a parameter is cut over an axis. kSplit: equal parts along `dim`, within each of `groups`
// equal runs of rows (fused or grouped rows). `units`: the smallest thing that may not be cut
// (key/value heads); 0 = single elements. kVocab: rows padded to a local multiple, then cut.
struct ShardRule {
  enum class Kind { kReplicate, kSplit, kVocab };
  Kind kind = Kind::kReplicate;
  int dim = 0;
  int64_t groups = 1;
  int64_t units = 0;
};

// Where a parameter acts decides its gradient sum (docs/architecture.md, gradients): on the
// residual stream (norms, row biases) or on tensors that are split over the tensor axis (QK-norm,
// column biases).
enum class Site { kResidual, kSplit };

// Where a shard may cut: anywhere; along rows of blocks (8-bit states); at parameter boundaries
// (Muon).
enum class UpdateKind { kElementwise, kRowBlock, kMatrix };

struct ParamSpec {
  std::string name;  // canonical = Hugging Face name; identity = (model, name)
  Shape shape;       // global, unpadded
  Init init;
  bool decay = true;
  int block = 0;
  ShardRule tensor;
  // Which of num_experts experts it belongs to; -1: none. An expert is whole on the ranks that hold
  // it: expert e on ep rank e / (num_experts / ep).
  int expert = -1;
  int num_experts = 0;
  Site site = Site::kResidual;
  UpdateKind update = UpdateKind::kElementwise;
  // Parameters with the same non-negative group within a block lie side by side in declared order
  // (q,k,v; gate,up), so that one GEMM can read them together.
  int fuse_group = -1;
  bool trainable = true;  // false: no gradient and no optimizer state (model.frozen)
  bool wide = false;      // its values stay in the master's type (precision.keep_fp32)
};

// Forward FLOPs of one token, by part, with causal attention counted exactly for rows of
// `sequence_length` (the mean number of keys a query sees; a sliding window caps it). Multiply-add
// = 2. Training = 3 x forward.
struct ForwardFlops {
  double linear = 0;     // all matrix products with weights except the head
  double attention = 0;  // scores and values
  double head = 0;
  // Of linear and attention, what selective recompute of a part runs once more.
  double again_attention = 0, again_mlp = 0;
  [[nodiscard]] double total() const { return linear + attention + head; }
};

// Bytes that an allocation of `bytes` is counted as: our allocator has eight size classes per power
// of two, LibTorch's of GPUs multiples of 512 bytes.
[[nodiscard]] int64_t allocation_bytes(int64_t bytes, bool on_gpu = false);

// What computes attention, as far as it decides memory: our kernels of CPUs, which write to where
// gradients belong; LibTorch's of CPUs (fp64); FlashAttention and the memory-efficient kernel
// (fp32) of GPUs; plain math for what they do not take.
enum class AttentionKernel { kOwn, kLibTorch, kFlash, kEfficient, kPlain };

// What the activations of a pass cost per rank. Sizes are in bytes for `tokens` local tokens, each
// tensor rounded by allocation_bytes.
struct ActivationQuery {
  int64_t tokens = 0;  // micro_samples x sequence_length on this rank
  int64_t sequence_length = 0;
  int64_t samples = 0;
  DType compute = DType::kFp32;
  DType residual = DType::kFp32;
  DType gradients = DType::kFp32;
  bool on_gpu = false;
  AttentionKernel attention = AttentionKernel::kOwn;
  bool plain_parts = false;  // of a ring, which plain math computes
  // Of a GPU whose FlashAttention adds up in one order (run.deterministic); else 0.
  int64_t ordered_multiprocessors = 0;
  bool draws_labels = false;  // at the head, for sophia's curvature
  // Sequences that kernels of variable lengths are counted for, of a micro-batch's whole rows: on a
  // GPU, with separate documents; else 0.
  int64_t documents = 0;
  // How a layout cuts the pass; the shape that goes with it holds this rank's heads, features and
  // vocabulary rows.
  int64_t kept_tokens = 0;  // of them outside of tensor-parallel layers; 0 = all
  int tensor = 1, context = 1;
  bool all_to_all = false;      // context by all-to-all instead of ring
  RemadeParts remade;           // counted as workspace while they are back
  bool overlap = false;         // rows cut over the tensor axis travel part by part
  int64_t grouped_experts = 0;  // of the rank, whose weight gradients are one product; 0 = one each
  int64_t exchanged_rows = 0;   // that its experts have room for; 0 = tokens x per_token
};
// One tensor (or group) behind the sums, in words, for reports and for comparing with measurements.
struct ActivationTerm {
  // The first three are kept from forward to backward. Workspaces come in phases: what one phase
  // holds is alive at once, and the largest phase counts.
  // kBlockInput: what is left of a layer that will be run again. kWeightWork: what the weight half
  // of a split backward holds of a layer; kWaiting: what it holds by a phase of the input half and
  // the workspace of that phase holds to be free.
  enum class Part {
    kEmbedding,
    kLayer,
    kHead,
    kLayerWorkspace,
    kHeadWorkspace,
    kBlockInput,
    kWeightWork,
    kWaiting
  };
  Part part = Part::kLayer;
  int phase = 0;
  std::string name;
  int64_t bytes = 0;  // negative: saved before, free again in this phase
};
struct ActivationBytes {
  int64_t saved_embedding = 0;  // kept from forward to backward by the embedding block
  int64_t saved_per_layer = 0;  // by one decoder layer, its block input included
  int64_t saved_head = 0;       // by the head, the gradient made in the forward included
  int64_t layer_workspace =
      0;  // transient peak on top of what is saved, forward or backward of one layer
  int64_t split_layer_workspace = 0;  // the same while the weight half is put off
  int64_t head_workspace = 0;         // logits chunk and what it is multiplied into
  int64_t block_input = 0;            // kept per layer under block recompute
  int64_t weight_work = 0;            // held per layer between the halves of a split backward
  std::vector<ActivationTerm> terms;  // what the sums are made of
};

struct FamilyDef {
  std::string name;
  std::function<std::vector<ParamSpec>(const ModelShape&)> param_table;
  std::function<ForwardFlops(const ModelShape&, int64_t sequence_length)> forward_flops;
  std::function<ActivationBytes(const ModelShape&, const ActivationQuery&)> activation_bytes;
  // config.json of the family, and the Hugging Face architecture name ("LlamaForCausalLM").
  std::string hf_architecture;
  std::string hf_model_type;
};

[[nodiscard]] const FamilyDef& find_family(
    const std::string& name);            // throws ConfigError naming what exists
void register_family(FamilyDef family);  // replaces one of the same name
[[nodiscard]] std::vector<std::string> family_names();
[[nodiscard]] int64_t count_parameters(const std::vector<ParamSpec>& table);

// How many tokens have their logits at a time in the head (nn and the memory report use the same
// number).
[[nodiscard]] int64_t head_chunk_tokens(int64_t vocab_size, int64_t tokens);
// Tokens of a chunk whose labels are drawn at a time, from probabilities added up in fp64.
[[nodiscard]] int64_t label_tokens(int64_t vocab_size, int64_t tokens);

// Hugging Face config.json text of a shape, and back (throws DataError listing what does not fit).
[[nodiscard]] std::string to_hf_config(const ModelShape& shape, DType dtype);
[[nodiscard]] ModelShape from_hf_config(const std::string& json_text, const std::string& origin);

}  // namespace capstan::plan
