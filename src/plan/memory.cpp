// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Memory by category and size of a checkpoint.
#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "capstan/base/bytes.h"
#include "capstan/base/text.h"
#include "capstan/plan/experts.h"
#include "capstan/plan/fp8.h"
#include "capstan/plan/frozen.h"
#include "capstan/plan/optimizer_states.h"
#include "plan/attention_scratch_internal.h"
#include "plan/memory_internal.h"
#include "plan/moe_internal.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

// The shape of what one rank of the tensor axis computes.
ModelShape local_shape(const Plan& plan) {
  ModelShape shape = plan.model().shape;
  const int64_t tp = plan.grid.sizes().tp;
  if (tp == 1) return shape;
  shape.num_attention_heads /= tp;
  shape.num_key_value_heads = std::max<int64_t>(1, shape.num_key_value_heads / tp);
  shape.intermediate_size /= tp;
  shape.experts.shared_intermediate_size /= tp;
  shape.vocab_size =
      round_up((shape.vocab_size + tp - 1) / tp, plan.model().layout.options().vocab_multiple);
  return shape;
}

// Of kernels of variable lengths.
bool has_lengths(const Plan& plan) {
  const AttentionKernel kernel = attention_kernel(plan);
  return plan.resolved.data.documents == "separate" &&
         (kernel == AttentionKernel::kFlash || kernel == AttentionKernel::kEfficient);
}

ActivationQuery activation_query(const Plan& plan) {
  const Grid::Sizes& grid = plan.grid.sizes();
  ActivationQuery query;
  query.samples = plan.batch.micro_samples;
  query.sequence_length = plan.batch.sequence_length / grid.cp;
  query.tokens = saturating_multiply(query.samples, query.sequence_length);
  query.compute = plan.precision.compute;
  query.residual = plan.precision.residual;
  query.gradients = plan.precision.gradients;
  query.on_gpu = is_on_gpu(plan);
  query.attention = attention_kernel(plan);
  query.plain_parts = has_plain_parts(plan);
  query.draws_labels = plan.resolved.optimizer.name == "sophia";
  if (query.on_gpu && plan.resolved.run.deterministic)
    query.ordered_multiprocessors = plan.topology.multiprocessors;
  if (has_lengths(plan))
    query.documents = assumed_documents(query.samples, plan.batch.sequence_length);
  query.kept_tokens = plan.resolved.parallel.sequence ? query.tokens / grid.tp : query.tokens;
  query.tensor = grid.tp;
  query.context = grid.cp;
  query.all_to_all = plan.resolved.parallel.context.method == "all_to_all";
  query.remade = remade_parts(plan.resolved.parallel.recompute);
  query.overlap = plan.resolved.parallel.sequence_overlap;
  if (query.on_gpu && !grouped_obstacle(plan.resolved) && !knows_expert_rows(plan))
    query.grouped_experts = plan.model().shape.experts.count / grid.ep;
  query.exchanged_rows = rows_with_room(plan.resolved, plan.model().shape, plan.batch,
                                        (query.tokens + grid.tp - 1) / grid.tp);
  return query;
}

// The table of rotary angles of a row.
int64_t rotary_bytes(const Plan& plan) {
  const ModelShape& shape = plan.model().shape;
  if (shape.family == "gpt2") return 0;  // its positions are parameters
  const DType angles = plan.precision.compute == DType::kFp64 ? DType::kFp64 : DType::kFp32;
  return 2 *
         stored_bytes(plan.batch.sequence_length * (shape.head_dim / 2), angles, is_on_gpu(plan));
}

// Token ids, targets and positions of all micro-batches of a step, first keys of documents, and
// this rank's part of them where rows are cut.
int64_t batch_bytes(const Plan& plan) {
  const BatchPlan& batch = plan.batch;
  const int cp = plan.grid.sizes().cp;
  const bool separate = plan.resolved.data.documents == "separate", on_gpu = is_on_gpu(plan);
  const auto rows = [&](int64_t tokens) {
    const int64_t all = saturating_multiply(batch.micro_samples, tokens);
    return 3 * stored_bytes(all, DType::kInt64, on_gpu) +
           (separate ? stored_bytes(all, DType::kInt32, on_gpu) : 0);
  };
  int64_t per_batch = rows(batch.sequence_length);
  if (cp > 1)
    per_batch += rows(batch.sequence_length / cp) +
                 stored_bytes(batch.sequence_length / cp, DType::kInt64, on_gpu);
  return saturating_multiply(batch.micro_batches, per_batch);
}

// Of master weights and states of the optimizer.
int64_t saved_bytes(const Plan& plan, int64_t elements, bool trainable, UpdateKind update) {
  const DType master = plan.precision.master;
  const int64_t weights = elements * static_cast<int64_t>(size_of(master));
  if (!trainable) return weights;
  return weights + state_bytes(optimizer_states(plan.resolved.optimizer, master, update), elements);
}

// Copies are shared out: each data-parallel rank saves its part of the weights and moments.
int64_t snapshot_bytes(const Plan& plan, const RankLayout& layout) {
  if (!plan.resolved.checkpoint.asynchronous) return 0;
  int64_t bytes = 0;
  for (const FlatBuffer& buffer : layout.buffers)
    bytes += saved_bytes(plan, buffer.numel, buffer.trainable, buffer.update);
  return bytes / plan.grid.size_of(kDenseAxes);
}

// The save at the end waits for its copy; those before are on their way in the next steps.
bool saves_beside_steps(const Plan& plan) {
  const auto& interval = plan.resolved.checkpoint.interval_steps;
  return interval && *interval < plan.batch.total_steps;
}

// Ranks of one pipeline rank differ by less than their padding.
int representative(const Plan& plan, int pipeline_rank) {
  return plan.grid.rank_of({.pp = pipeline_rank});
}

std::string list_categories(const MemoryReport& m) {
  std::string text = fmt::format(
      "parameters {}, master {}, gradients {}, optimizer {}, activations {}, workspace {}, "
      "communication {}, data {}",
      format_bytes(m.parameters), format_bytes(m.master), format_bytes(m.gradients),
      format_bytes(m.optimizer), format_bytes(m.activations), format_bytes(m.workspace),
      format_bytes(m.communication), format_bytes(m.data));
  if (m.saving > m.peak())
    text += ", copy of an asynchronous checkpoint " + format_bytes(m.checkpoint_snapshot);
  if (m.device > 0) text += ", device " + format_bytes(m.device);
  if (m.host > 0) text += fmt::format(", of which {} on the host", format_bytes(m.host));
  return text;
}

}  // namespace

int64_t assumed_documents(int64_t samples, int64_t row_length) {
  constexpr int64_t kDocument = 256;
  const int64_t in_a_row = (row_length + kDocument - 1) / kDocument;
  return static_cast<int64_t>(
      std::bit_ceil(static_cast<uint64_t>(saturating_multiply(samples, in_a_row))));
}

ActivationBytes activation_bytes_of(const Plan& plan) {
  const ModelShape shape = local_shape(plan);
  ActivationBytes bytes = find_family(shape.family).activation_bytes(shape, activation_query(plan));
  add_fp8_work(bytes, plan);
  return bytes;
}

MemoryReport report_memory(const Plan& plan, int rank) {
  const RankLayout layout = plan.model().layout.rank(rank);
  MemoryReport memory;
  memory.rank = rank;
  add_storage(memory, plan, layout);
  memory.parameters += fp8_kept_bytes(plan, layout);
  const int64_t between_steps = memory.peak() + rotary_bytes(plan);
  const StepMoment peak = find_peak(plan, layout, plan.grid.coord(rank).pp);
  memory.parameters += peak.values;
  memory.gradients += peak.gradients;
  memory.activations = peak.activations + peak.host;
  memory.workspace = peak.workspace;
  memory.communication = peak.communication;
  memory.data = batch_bytes(plan) + rotary_bytes(plan);
  memory.device = device_bytes(plan, memory);
  memory.host = host_bytes(plan, layout) + peak.host;
  memory.checkpoint_snapshot = snapshot_bytes(plan, layout);
  if (memory.checkpoint_snapshot > 0 && !is_on_gpu(plan))
    memory.saving = (saves_beside_steps(plan) ? memory.peak() : between_steps) +
                    allocation_bytes(memory.checkpoint_snapshot);
  memory.host_taken = host_taken_bytes(plan, layout, memory, peak.host);
  return memory;
}

int64_t largest_run_peak(const Plan& plan) {
  int64_t largest = plan.memory.run_peak();
  for (int stage = 1; stage < plan.grid.sizes().pp; ++stage)
    largest = std::max(largest, report_memory(plan, representative(plan, stage)).run_peak());
  return largest;
}

int64_t predict_checkpoint_bytes(const Plan& plan) {
  // Weights, moments of those that are trained, and room for headers, manifest, recipe and
  // tokenizer.
  constexpr int64_t kSlack = 4 * kMiB, kSlackPerRank = 64 * kKiB;
  int64_t bytes = kSlack + kSlackPerRank * plan.grid.size();
  for (const ParamSpec& spec : plan.model().table())
    bytes += saved_bytes(plan, numel(spec.shape), spec.trainable, spec.update);
  return bytes;
}

namespace {

// Of the ranks of a host, which are consecutive: where it holds all of them each counts for itself,
// else as the largest.
struct HostSum {
  MemoryReport largest;
  int64_t bytes = 0;
};
HostSum sum_over_host(const Plan& plan, int64_t (*of)(const MemoryReport&)) {
  const int local = std::max(plan.topology.local_size, 1), stages = plan.grid.sizes().pp;
  HostSum sum{plan.memory, 0};
  for (int stage = 0; stage < stages; ++stage) {
    const MemoryReport m =
        stage == 0 ? plan.memory : report_memory(plan, representative(plan, stage));
    if (of(m) > of(sum.largest)) sum.largest = m;
    sum.bytes += saturating_multiply(std::min(of(m), kSaturated), plan.grid.size() / stages);
    sum.bytes = std::min(sum.bytes, kSaturated);
  }
  if (local != plan.grid.size())
    sum.bytes = saturating_multiply(std::min(of(sum.largest), kSaturated), local);
  return sum;
}

std::string each(const Plan& plan, int64_t bytes) {
  return fmt::format("{} ranks here x {} each", std::max(plan.topology.local_size, 1),
                     format_bytes(bytes));
}

constexpr const char* kOutOfMemory = "training would run out of memory";

bool is_mostly_passes(const MemoryReport& m) {
  return m.activations + m.workspace > m.needed() / 2;
}

// What the recipe has not done yet to take less of a GPU.
std::string ways_to_fit(const Plan& plan, const MemoryReport& m) {
  const recipe::Recipe& r = plan.resolved;
  const Grid::Sizes& grid = plan.grid.sizes();
  std::vector<std::string> ways;
  if (is_mostly_passes(m)) {
    ways.emplace_back("Lower batch.micro_samples or batch.sequence_length");
    if (r.parallel.recompute.mode == "none")
      ways.emplace_back("set parallel.recompute.mode: block");
    return join(ways, ", or ");
  }
  ways.emplace_back("Make the model smaller");
  if (grid.dp_replicate * grid.dp_shard > 1 && r.parallel.zero.stage < 3)
    ways.emplace_back("raise parallel.zero.stage");
  if (r.optimizer.moments == "auto" && plan.precision.compute != DType::kFp64)
    ways.emplace_back("set optimizer.moments: bf16 or int8");
  if (r.parallel.zero.offload == "none" && !r.run.graphs && !r.optimizer.in_backward)
    ways.emplace_back("set parallel.zero.offload: optimizer");
  return join(ways, ", or ");
}

// A rank has one GPU, whatever the others leave free on theirs.
void check_gpu_memory(Draft& draft, const Plan& plan, const MemoryReport& largest) {
  const int64_t gpu = plan.topology.memory_bytes / std::max(plan.topology.local_size, 1);
  if (largest.needed() <= gpu) return;
  draft.refuse({"batch.micro_samples",
                fmt::format("{} on rank {} ({})", format_bytes(largest.needed()), largest.rank,
                            list_categories(largest)),
                fmt::format("at most {} on the GPU of a rank", format_bytes(gpu)), kOutOfMemory,
                ways_to_fit(plan, largest)});
}

}  // namespace

void check_memory(Draft& draft, const Plan& plan) {
  const int64_t available = plan.topology.memory_bytes;
  if (available <= 0) return;
  const auto [largest, sum] = sum_over_host(plan, [](const MemoryReport& m) { return m.needed(); });
  if (is_on_gpu(plan)) return check_gpu_memory(draft, plan, largest);
  if (sum <= available) return;
  draft.refuse({"batch.micro_samples",
                fmt::format("{} ({}{})", each(plan, largest.needed()),
                            largest.rank > 0 ? fmt::format("rank {}: ", largest.rank) : "",
                            list_categories(largest)),
                fmt::format("at most {} on this host", format_bytes(available)), kOutOfMemory,
                is_mostly_passes(largest)
                    ? "Lower batch.micro_samples or batch.sequence_length, or start fewer ranks"
                    : "Make the model smaller, or start fewer ranks"});
}

void check_host_memory(Draft& draft, const Plan& plan) {
  const int64_t available = plan.topology.host_memory_bytes;
  if (available <= 0) return;
  const auto [largest, sum] =
      sum_over_host(plan, [](const MemoryReport& m) { return m.host_taken; });
  if (sum <= available) return;
  const recipe::Parallel& parallel = plan.resolved.parallel;
  std::string key = "checkpoint.asynchronous", fix = "Set checkpoint.asynchronous: false";
  if (parallel.zero.offload != "none" || parallel.offload_activations) {
    key =
        parallel.zero.offload != "none" ? "parallel.zero.offload" : "parallel.offload_activations";
    fix = "Offload less (parallel.zero.offload: none, parallel.offload_activations: false)";
  }
  draft.refuse({key,
                fmt::format("{} ({} offloaded, for which slabs of powers of two are pinned, {} for "
                            "the copy of an asynchronous checkpoint)",
                            each(plan, largest.host_taken), format_bytes(largest.host),
                            format_bytes(largest.checkpoint_snapshot)),
                fmt::format("at most {} beside the GPUs of this host", format_bytes(available)),
                "the host would run out of memory", fix + ", or start fewer ranks on a host"});
}

}  // namespace capstan::plan
