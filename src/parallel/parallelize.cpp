// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/parallelize.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "capstan/base/check.h"
#include "capstan/device/accelerator.h"
#include "capstan/parallel/parallel_seams.h"
#include "capstan/plan/fp8.h"
#include "capstan/plan/gradient_places.h"

namespace capstan::parallel {
namespace {

// What every stage reads.
struct Request {
  const plan::Plan& plan;
  const plan::ModelPlan& model;
  mesh::Mesh& mesh;
  const BucketHooks& hooks;
};

const recipe::Parallel& recipe_of(const Request& r) { return r.plan.resolved.parallel; }

// Which blocks this rank computes, by chunk, and its neighbours.
void split_stages(ParallelModel& out, const Request& r) {
  const auto layout = r.model.layout.rank(r.mesh.rank());
  const auto& stages = r.plan.schedule.stage_of.at(static_cast<size_t>(r.mesh.coord().pp));
  for (size_t c = 0; c < stages.size(); ++c) out.chunks.push_back({stages[c], layout.chunks.at(c)});
  const comm::Communicator& pipeline = r.mesh.along(plan::Axis::kPp);
  std::vector<int> all(static_cast<size_t>(pipeline.size()));
  std::iota(all.begin(), all.end(), 0);
  out.links = {pipeline, pipeline.size() > 1 ? pipeline.split("pp", all) : pipeline};
}

void choose_fp8(ParallelModel& out, const Request& r) {
  const recipe::Fp8& fp8 = r.plan.resolved.precision.fp8;
  if (!plan::uses_fp8(r.plan.resolved)) return;
  const std::map<std::string, ops::Fp8Scaling> scalings{{"tensor", ops::Fp8Scaling::kTensor},
                                                        {"row", ops::Fp8Scaling::kRow},
                                                        {"delayed", ops::Fp8Scaling::kDelayed}};
  std::vector<std::string> names;
  for (const plan::ParamSpec* spec : plan::fp8_weights(r.model.shape, r.model.table()))
    names.push_back(spec->name);
  out.fp8 = std::make_shared<ops::Fp8Linear>(ops::Fp8Options{
      .scaling = scalings.at(fp8.scaling),
      .gradients = fp8.gradients == "e4m3" ? ops::Fp8Format::kE4m3 : ops::Fp8Format::kE5m2,
      .keeps_weights = plan::keeps_fp8_weights(r.plan.resolved),
      .history = fp8.history,
      .projections = std::move(names),
      .device = device::run_device()});
}

// The cuts over the tensor, sequence, context and expert axes.
void cut_seams(ParallelModel& out, const Request& r) {
  const plan::Grid::Sizes& sizes = r.plan.grid.sizes();
  const comm::Communicator& rows = r.mesh.along(plan::AxisSet(plan::Axis::kCp) | plan::Axis::kTp);
  if (sizes.tp == 1 && sizes.cp == 1 && sizes.ep == 1 && !out.fp8) {
    out.seams = std::make_unique<nn::Seams>();
    return;
  }
  out.seams = std::make_unique<ParallelSeams>(
      ParallelSeamsOptions{.tensor = r.mesh.along(plan::Axis::kTp),
                           .context = r.mesh.along(plan::Axis::kCp),
                           .sequence_parallel = recipe_of(r).sequence,
                           .all_to_all = recipe_of(r).context.method == "all_to_all",
                           .overlap_chunks = recipe_of(r).sequence_overlap,
                           .expert = r.mesh.along(plan::Axis::kEp),
                           .rows = rows,
                           .fp8 = out.fp8});
}

// What the routers of this rank's layers keep from step to step.
void watch_experts(ParallelModel& out, const Request& r) {
  if (r.model.shape.experts.count == 0) return;
  std::vector<int> layers;
  for (const Chunk& chunk : out.chunks)
    for (const int block : chunk.blocks)
      if (block > 0 && block < r.model.shape.head_block()) layers.push_back(block - 1);
  const bool wide = r.plan.precision.compute == DType::kFp64;
  out.balance = std::make_unique<ExpertBalance>(r.model.shape, std::move(layers),
                                                wide ? at::kDouble : at::kFloat);
}

void choose_recompute(ParallelModel& out, const Request& r) {
  const recipe::Recompute& recompute = recipe_of(r).recompute;
  out.recompute_blocks = recompute.mode == "block";
  device::Accelerator* const device = device::accelerator();
  const bool offloads = recipe_of(r).offload_activations || recipe_of(r).zero.offload != "none";
  if (device && offloads) out.link = std::make_unique<HostLink>(*device);
  if (recipe_of(r).offload_activations)
    out.activation_offload = std::make_unique<ActivationOffload>(out.link.get());
}

// Groups of tensor ranks that hold the same part of a parameter, by their size. Every rank makes
// the same ones in the same order.
std::map<int, comm::Communicator> holder_groups(const Request& r) {
  const comm::Communicator& tensor = r.mesh.along(plan::Axis::kTp);
  std::map<int, comm::Communicator> groups{{tensor.size(), tensor}};
  for (const plan::ParamSpec& spec : r.model.table())
    if (spec.tensor.units > 0 && spec.tensor.units < tensor.size())
      groups.try_emplace(static_cast<int>(tensor.size() / spec.tensor.units));
  for (auto& [size, group] : groups) {
    if (size == tensor.size()) continue;
    std::vector<int> ranks;
    for (int i = 0; i < size; ++i) ranks.push_back(tensor.rank() / size * size + i);
    group = tensor.split("tp", ranks);
  }
  return groups;
}

// First and last stage of a tied model that holds the embedding twice; one rank elsewhere.
comm::Communicator tied_group(const Request& r) {
  const auto& rank_of = r.plan.schedule.rank_of;
  const int first = std::min(rank_of.front(), rank_of.back()),
            last = std::max(rank_of.front(), rank_of.back());
  if (!r.model.shape.tie_word_embeddings || first == last) return {};
  const comm::Communicator& pipeline = r.mesh.along(plan::Axis::kPp);
  const bool holds = pipeline.rank() == first || pipeline.rank() == last;
  return pipeline.split("pp",
                        holds ? std::vector<int>{first, last} : std::vector<int>{pipeline.rank()});
}

struct SumGroups {
  std::map<int, comm::Communicator> holders;
  comm::Communicator tied;
};

// Adds the parameters of one buffer that are summed over tensor ranks first.
void add_partial_sums(GradientBuckets::Bucket& bucket, int store, const plan::FlatBuffer& buffer,
                      const SumGroups& groups, std::map<int, PartialSum>& by_holders) {
  for (const plan::LocalParam& param : buffer.params) {
    if (param.extra_sum.has(plan::Axis::kPp)) {
      bucket.tied = groups.tied;
      bucket.tied_stores = {store};
    }
    if (!param.extra_sum.has(plan::Axis::kTp)) continue;
    PartialSum& sum = by_holders[param.holders];
    sum.group = groups.holders.at(param.holders);
    const bool continues = !sum.ranges.empty() && sum.ranges.back().store == store &&
                           sum.ranges.back().begin + sum.ranges.back().count == param.flat_begin;
    if (continues)
      sum.ranges.back().count += param.numel();
    else
      sum.ranges.push_back({store, param.flat_begin, param.numel()});
  }
}

// What stores write gradients to in turn, where the optimizer runs in the backward.
class SharedMemory {
 public:
  SharedMemory(const plan::RankLayout& layout, const Request& r, at::TensorOptions options) {
    if (!r.plan.resolved.optimizer.in_backward) return;
    places_ = plan::place_gradients(r.plan.grid, layout, r.model.shape.tie_word_embeddings,
                                    r.model.layout.options().zero_stage);
    memory_ = at::zeros({places_.numel}, options);
  }
  [[nodiscard]] bool is_used() const { return memory_.defined(); }
  [[nodiscard]] Tensor of_store(int store, int64_t numel) const {
    return memory_.narrow(0, places_.begin[static_cast<size_t>(store)], numel);
  }

 private:
  plan::SharedGradients places_;
  Tensor memory_;
};

// The gradient memory of a bucket is one tensor, cut into the slices of its stores; with ZeRO a
// store has its own.
std::vector<GradientBuckets::Bucket> make_sum_buckets(const plan::RankLayout& layout,
                                                      const Request& r, const SumGroups& groups,
                                                      std::vector<Tensor>& gradients) {
  const auto options = at::TensorOptions()
                           .device(device::run_device())
                           .dtype(scalar_type_of(r.plan.precision.gradients));
  const SharedMemory shared(layout, r, options);
  const int stage = r.model.layout.options().zero_stage;
  const bool shards = stage > 0;
  std::vector<GradientBuckets::Bucket> buckets;
  for (const auto& members :
       plan::make_buckets(layout, r.plan.precision.gradients, r.plan.bucket_bytes)) {
    const plan::FlatBuffer& first = layout.buffers[static_cast<size_t>(members.front())];
    GradientBuckets::Bucket bucket;
    bucket.stores = members;
    bucket.sum = r.mesh.along(shards ? first.shard_axes : first.sum_axes);
    if (shards) bucket.replicas = r.mesh.along(first.replica_axes());
    std::map<int, PartialSum> by_holders;
    int64_t numel = 0;
    for (const int i : members) {
      const plan::FlatBuffer& buffer = layout.buffers[static_cast<size_t>(i)];
      add_partial_sums(bucket, i, buffer, groups, by_holders);
      numel += buffer.numel;
    }
    for (auto& [holders, sum] : by_holders) bucket.partial.push_back(std::move(sum));
    if (shared.is_used()) {
      CAPSTAN_CHECK(members.size() == 1, "{} stores of a bucket share memory", members.size());
      const int64_t kept = stage >= 2 ? first.shard_numel() : numel;
      Tensor& memory = gradients[static_cast<size_t>(members.front())];
      memory = shared.of_store(members.front(), kept);
      if (!shards) bucket.gradients = memory;
    } else if (!shards) {
      bucket.gradients = at::zeros({numel}, options);
      int64_t begin = 0;
      for (const int i : members) {
        const int64_t size = layout.buffers[static_cast<size_t>(i)].numel;
        gradients[static_cast<size_t>(i)] = bucket.gradients.narrow(0, begin, size);
        begin += size;
      }
    }
    buckets.push_back(std::move(bucket));
  }
  return buckets;
}

StoreOptions store_options(const Request& r, const plan::FlatBuffer& buffer,
                           const ParallelModel& out) {
  const recipe::Zero& zero = recipe_of(r).zero;
  return {.types = storage_types(r.plan.precision),
          .device = device::run_device(),
          .zero_stage = r.model.layout.options().zero_stage,
          .reshard_after_forward = zero.reshard_after_forward,
          .offload_optimizer = zero.offload != "none",
          .offload_parameters = zero.offload == "all",
          .link = zero.offload == "none" ? nullptr : out.link.get(),
          .counts_in_norm = r.mesh.index(buffer.replica_axes()) == 0,
          .shard = r.mesh.along(buffer.shard_axes),
          .queue = out.queue.get()};
}

// Groups that only some layouts need are made here, by all ranks in the same order.
void make_groups(const Request& r) {
  for (const plan::AxisSet sum : {plan::kDenseAxes, plan::kExpertDataAxes}) (void)r.mesh.along(sum);
  const plan::AxisSet shard = plan::AxisSet(plan::Axis::kDpShard) | plan::Axis::kCp;
  for (const plan::AxisSet axes : {shard, plan::AxisSet(plan::Axis::kDpReplicate), plan::AxisSet()})
    (void)r.mesh.along(axes);
}

void store_flat(ParallelModel& out, const Request& r) {
  make_groups(r);
  const SumGroups groups{holder_groups(r), tied_group(r)};
  const auto layout = r.model.layout.rank(r.mesh.rank());
  std::vector<Tensor> gradients(layout.buffers.size());
  auto buckets = make_sum_buckets(layout, r, groups, gradients);
  out.queue = std::make_unique<WeightQueue>();
  std::vector<FlatStore*> stores;
  out.stores_of_block.resize(static_cast<size_t>(r.model.shape.num_blocks()));
  for (size_t i = 0; i < layout.buffers.size(); ++i) {
    const auto& buffer = layout.buffers[i];
    out.stores.push_back(std::make_unique<FlatStore>(
        buffer, r.model.table(), store_options(r, buffer, out), std::move(gradients[i])));
    stores.push_back(out.stores.back().get());
    out.stores_of_block[static_cast<size_t>(buffer.block)].push_back(static_cast<int>(i));
  }
  const plan::PrecisionPlan& precision = r.plan.precision;
  out.buckets =
      std::make_unique<GradientBuckets>(std::move(buckets), std::move(stores), r.hooks,
                                        precision.reduction == precision.gradients
                                            ? std::nullopt
                                            : std::optional(scalar_type_of(precision.reduction)));
  const bool tied = r.model.shape.tie_word_embeddings;
  const auto when = recipe_of(r).zero.reduce == "micro_batch" ? plan::ReduceWhen::kMicroBatch
                                                              : plan::ReduceWhen::kStep;
  out.passes = plan::list_passes(r.plan.schedule, r.mesh.coord().pp, layout, tied, when);
  if (!tied || layout.blocks.back() != r.model.shape.head_block()) return;
  auto& head = out.stores_of_block.back();  // reads the embedding's table as well
  const auto& embedding = out.stores_of_block.front();
  head.insert(head.end(), embedding.begin(), embedding.end());
}

void build_blocks(ParallelModel& out, const Request& r) {
  const nn::ModelOptions options{.compute = scalar_type_of(r.plan.precision.compute),
                                 .residual = scalar_type_of(r.plan.precision.residual),
                                 .expert_ranks = r.mesh.size(plan::Axis::kEp),
                                 .expert_rank = r.mesh.index(plan::Axis::kEp),
                                 .remade = plan::remade_parts(recipe_of(r).recompute)};
  out.model = nn::build_model(r.model.shape, options, [&](const std::string& name) {
    const auto& table = r.model.table();
    const bool exists = std::any_of(table.begin(), table.end(),
                                    [&](const auto& spec) { return spec.name == name; });
    CAPSTAN_CHECK(exists, "model {} has no parameter {}", out.name, name);
    return out.find(name);
  });
}

}  // namespace

param::Param ParallelModel::find(const std::string& parameter) const {
  for (const auto& store : stores)
    if (const auto index = store->find(parameter)) return {store.get(), *index};
  return {};
}

ParallelModel parallelize(const plan::Plan& plan, const std::string& model, mesh::Mesh& mesh,
                          BucketHooks hooks) {
  const Request request{plan, plan.models.at(model), mesh, hooks};
  ParallelModel out;
  out.name = model;
  split_stages(out, request);
  choose_fp8(out, request);
  cut_seams(out, request);
  watch_experts(out, request);
  choose_recompute(out, request);
  store_flat(out, request);
  build_blocks(out, request);
  return out;
}

}  // namespace capstan::parallel
