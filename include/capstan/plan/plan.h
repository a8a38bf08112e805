// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The plan of a run: everything derived from recipe and topology before any rank starts. Pure and
// torch-free.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "capstan/base/dtype.h"
#include "capstan/plan/layout.h"
#include "capstan/plan/schedule.h"
#include "capstan/recipe/load.h"

namespace capstan::plan {

// What the run will be placed on.
struct Topology {
  int world_size = 1;
  int local_size = 1;
  std::string device = "cpu";
  int physical_cores = 1;         // allowed to this process
  int64_t memory_bytes = 0;       // of this host, with cuda of its GPUs; 0 = unknown
  int64_t host_memory_bytes = 0;  // with cuda, of this host beside its GPUs; 0 = unknown
  bool fast_bf16 = false;         // AVX512-BF16, AMX or sm_80 up
  int multiprocessors = 132;      // of a GPU; an H100's where none is known
};
// This machine. device: what run.device asks for; auto takes GPUs when there is one for every rank
// and the CUDA plug-in is there.
[[nodiscard]] Topology local_topology(int world_size, int local_size,
                                      const std::string& device = "auto");

struct PrecisionPlan {
  DType compute, residual, master, gradients;
  DType reduction;  // of gradients on their way between ranks of the data axes and stages
  bool dynamic_loss_scale = false;
  double loss_scale = 1.0;  // fixed scale when not dynamic
};
// Of the values that ops read from a buffer.
[[nodiscard]] inline DType value_dtype(const PrecisionPlan& precision, const FlatBuffer& buffer) {
  return buffer.wide ? precision.master : precision.compute;
}

struct BatchPlan {
  int64_t global_samples, micro_samples, sequence_length;
  int64_t samples_per_rank;  // of one optimizer step, per data-parallel rank
  int64_t micro_batches;     // accumulation steps per rank
  int64_t tokens_per_step;   // global_samples x sequence_length
  int64_t total_steps;
};

struct FlopCount {
  double per_token = 0;  // training, 3 x forward
  ForwardFlops forward;
  std::string convention = "causal";  // printed beside every figure
};

// Bytes of one rank by category, as our allocator will count them (sizes after rounding are its
// business).
struct MemoryReport {
  int rank = 0;
  int64_t parameters = 0;  // storage dtype copies used by the forward, gathered ones included
  int64_t master = 0;      // fp32 (fp64) master, 0 when the parameters are the master
  int64_t gradients = 0;
  int64_t optimizer = 0;  // moments
  int64_t activations =
      0;  // saved at the peak, all micro-batches in flight; the next two at the same moment
  // Transient: logits chunk, attention, GEMM outputs, what travels over tensor and context axes.
  int64_t workspace = 0;
  // Staging of gradient sums between processes; ranks that are threads of one process need none.
  int64_t communication = 0;
  int64_t data = 0;                 // ids, targets, positions, RoPE table
  int64_t checkpoint_snapshot = 0;  // host copy of an asynchronous save; not in the step's peak
  // Where that copy lies beside tensors (on CPUs), the largest moment with it: a step's peak where
  // steps follow a save, else what lives between steps. 0 elsewhere.
  int64_t saving = 0;
  // On cuda, beside tensors: CUDA context, workspaces of cuBLAS, buffers of NCCL, the pool of
  // run.graphs. Assumed, not measured.
  int64_t device = 0;
  // On cuda, what of the peak lies in host memory: by zero.offload, and by offload_activations the
  // most of a step.
  int64_t host = 0;
  // What the host gives for it: pinned memory in slabs, moments, the copy of an asynchronous save.
  int64_t host_taken = 0;
  [[nodiscard]] int64_t peak() const {
    return parameters + master + gradients + optimizer + activations + workspace + communication +
           data;
  }
  // Of a whole run, saves included: what its last line compares with the allocator's count.
  [[nodiscard]] int64_t run_peak() const { return std::max(peak(), saving); }
  // Of the memory of the host, on cuda of the GPU.
  [[nodiscard]] int64_t needed() const { return run_peak() - host + device; }
};

// Predicted calls and bytes of one training step of a rank: key "axis/op", e.g.
// "dp_replicate+dp_shard+cp/all_reduce"; bytes are what the rank hands in (a receive: what it
// takes), so that comm::Ledger counts the same. Counts, flags and sums of a few scalars travel on
// the axis "control", which is not predicted. Axes of one rank carry nothing. Rows that go to
// experts (axis "ep") depend on the router: predicted for an even load, or exactly where they
// travel in exchanges of one size.
struct TrafficEntry {
  int64_t calls = 0, bytes = 0;
};
using Traffic = std::map<std::string, TrafficEntry>;

struct ModelPlan {
  ModelShape shape;
  Layout layout;
  int64_t parameters = 0;  // tied weights once
  [[nodiscard]] const std::vector<ParamSpec>& table() const { return layout.table(); }
};

struct Plan {
  std::map<std::string, ModelPlan> models;  // "policy" today; teacher, reference, reward later
  Grid grid;
  Schedule schedule;
  PrecisionPlan precision;
  BatchPlan batch;
  FlopCount flops;
  MemoryReport memory;           // of rank 0
  Traffic traffic;               // of rank 0
  int64_t checkpoint_bytes = 0;  // one committed checkpoint, all ranks
  int threads_per_rank = 1;
  int64_t bucket_bytes = 0;
  Topology topology;
  recipe::Recipe resolved;  // every `auto` fixed
  std::vector<std::string>
      choices;  // "precision.compute: auto -> fp32 (no fast bf16)", logged once

  [[nodiscard]] const ModelPlan& model() const { return models.at("policy"); }
};

// lr_schedule.decay is resolved to the length of the fall after warm-up, in lr_schedule.unit (left
// `auto` where the kind has none); parallel.zero.shard_size and parallel.pipeline.split stay `auto`
// while there is nothing to cut.

// What files say about the model before planning: sizes the recipe leaves to `auto`.
struct PlanInputs {
  std::optional<int64_t> tokenizer_vocab_size;
};

// Throws recipe::RecipeError with every problem that needs the topology (axes x world size, heads %
// tensor, batch not divisible, memory). Pure: reads no file.
[[nodiscard]] Plan make_plan(const recipe::Resolved& recipe, const Topology& topology,
                             const PlanInputs& inputs);

// Of any rank of the plan.
[[nodiscard]] MemoryReport report_memory(const Plan& plan, int rank);
// The largest run_peak() of all ranks.
[[nodiscard]] int64_t largest_run_peak(const Plan& plan);
[[nodiscard]] Traffic predict_traffic(const Plan& plan, int rank);

[[nodiscard]] std::string describe_plan(const Plan& plan);  // for people
// For programs, and plan.json of the run directory. One object; keys are stable, new ones may be
// added:
//   schema 1 | choices [text] | device | world_size | threads_per_rank
//   grid {pp, dp_replicate, dp_shard, cp, tp, ep} | zero_stage
//   model {config.json keys, family} | parameters {total, trainable, groups {embedding, attention,
//   ...: n}} precision {compute, residual, master, gradients, reduction, loss_scale: number |
//   "dynamic" | null} batch {global_samples, micro_samples, sequence_length, samples_per_rank,
//   micro_batches, tokens_per_step} run {total_steps, total_tokens} flops {convention, per_token,
//   forward {linear, attention, head}, six_n} memory {rank, parameters, master, gradients,
//   optimizer, activations, workspace, communication, data, peak (of a step), saving, run_peak =
//           the larger, checkpoint_snapshot, device, host, host_taken, needed = run_peak - host +
//           device, activation_terms [{part, phase, name, bytes}]}    bytes
//   traffic {"axis/op": {calls, bytes}}    per step, rank 0
//   buckets [{blocks [n], bytes}]          in the order of their reductions, rank 0
//   ranks [{rank, pp, blocks [n], parameters, flops, flops_again, memory, traffic}]   the first
//   rank of each pipeline rank; flops of a step = 3 x forward, flops_again by recomputation
//   schedule {name, stages, micro_batches, peak_in_flight [n], ranks [[{op, chunk, micro_batch,
//   peer}]]} layout {blocks [n], buffers [{block, trainable, shards, numel, params [{name,
//   local_shape, flat_begin}]}]}   rank 0 checkpoint_bytes
[[nodiscard]] std::string plan_json(const Plan& plan);
// Parameters by what they are for, in order of the table: embedding, attention, feed-forward,
// norms, head, other; tables of positions apart.
[[nodiscard]] std::vector<std::pair<std::string, int64_t>> parameter_groups(
    const std::vector<ParamSpec>& table);

}  // namespace capstan::plan
