// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/parallel/parallelize.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"

namespace capstan::parallel {
namespace {

// What every stage reads.
struct Request {
  const plan::Plan& plan;
  const plan::ModelPlan& model;
  mesh::Mesh& mesh;
  const BucketHooks& hooks;
};

// Validation refuses such recipes; a plan made by hand may still ask.
void require_one(const char* key, int64_t size) {
  if (size == 1) return;
  throw ConfigError(ErrorText{.module = "parallel",
                              .what = "parallelizing the model",
                              .got = fmt::format("{} {}", key, size),
                              .need = "1",
                              .why = "this build has no such engine",
                              .fix = fmt::format("Set {} to 1", key)});
}

// Which blocks this rank computes, by chunk.
void split_stages(ParallelModel& out, const Request& r) {
  require_one("parallel.pipeline.size", r.plan.grid.sizes().pp);
  const auto layout = r.model.layout.rank(r.mesh.rank());
  const auto& stages = r.plan.schedule.stage_of.at(static_cast<size_t>(r.mesh.coord().pp));
  CAPSTAN_CHECK(stages.size() == 1, "{} chunks on one pipeline rank", stages.size());
  out.chunks = {{stages.front(), layout.blocks}};
}

// The seams hold the cuts over tensor, sequence, context and expert axes; one device has none.
void split_tensors(ParallelModel& out, const Request& r) {
  require_one("parallel.tensor", r.plan.grid.sizes().tp);
  out.seams = std::make_unique<nn::Seams>();
}

void split_context(const Request& r) {
  require_one("parallel.context.size", r.plan.grid.sizes().cp);
}

void split_experts(const Request& r) { require_one("parallel.expert", r.plan.grid.sizes().ep); }

void choose_recompute(const Request& r) {
  const auto& mode = r.plan.resolved.parallel.recompute.mode;
  if (mode == "none") return;
  throw ConfigError(ErrorText{.module = "parallel",
                              .what = "parallelizing the model",
                              .got = fmt::format("parallel.recompute.mode '{}'", mode),
                              .need = "none",
                              .why = "this build keeps all activations",
                              .fix = {}});
}

// The gradient memory of a bucket is one tensor, cut into the slices of its stores.
std::vector<GradientBuckets::Bucket> allocate_buckets(const plan::RankLayout& layout,
                                                      const Request& r,
                                                      std::vector<Tensor>& gradients) {
  const auto type = scalar_type_of(r.plan.precision.gradients);
  std::vector<GradientBuckets::Bucket> buckets;
  const auto groups = plan::make_buckets(layout, r.plan.precision.gradients, r.plan.bucket_bytes);
  for (const auto& members : groups) {
    int64_t numel = 0, begin = 0;
    for (const int i : members) numel += layout.buffers[static_cast<size_t>(i)].numel;
    GradientBuckets::Bucket bucket;
    bucket.gradients = at::zeros({numel}, type);
    bucket.stores = members;
    bucket.group = r.mesh.along(layout.buffers[static_cast<size_t>(members.front())].sum_axes);
    for (const int i : members) {
      const int64_t size = layout.buffers[static_cast<size_t>(i)].numel;
      gradients[static_cast<size_t>(i)] = bucket.gradients.narrow(0, begin, size);
      begin += size;
    }
    buckets.push_back(std::move(bucket));
  }
  return buckets;
}

void store_flat(ParallelModel& out, const Request& r) {
  CAPSTAN_CHECK(r.model.layout.options().zero_stage == 0, "ZeRO stage {}",
                r.model.layout.options().zero_stage);
  const auto layout = r.model.layout.rank(r.mesh.rank());
  const auto types = storage_types(r.plan.precision);
  std::vector<Tensor> gradients(layout.buffers.size());
  auto buckets = allocate_buckets(layout, r, gradients);
  std::vector<FlatStore*> stores;
  out.stores_of_block.resize(static_cast<size_t>(r.model.shape.num_blocks()));
  for (size_t i = 0; i < layout.buffers.size(); ++i) {
    const auto& buffer = layout.buffers[i];
    for (const auto& local : buffer.params)
      CAPSTAN_CHECK(local.extra_sum.empty(), "{}: gradient sum over {}",
                    r.model.table()[static_cast<size_t>(local.spec)].name,
                    plan::name_of(local.extra_sum));
    const bool counts = r.mesh.index(buffer.sum_axes) == 0;
    out.stores.push_back(std::make_unique<FlatStore>(buffer, r.model.table(), types,
                                                     std::move(gradients[i]), counts));
    stores.push_back(out.stores.back().get());
    out.stores_of_block[static_cast<size_t>(buffer.block)].push_back(static_cast<int>(i));
  }
  out.buckets = std::make_unique<GradientBuckets>(std::move(buckets), std::move(stores), r.hooks);
  if (!r.model.shape.tie_word_embeddings) return;
  auto& head = out.stores_of_block.back();  // reads the embedding's table as well
  const auto& embedding = out.stores_of_block.front();
  head.insert(head.end(), embedding.begin(), embedding.end());
}

void build_blocks(ParallelModel& out, const Request& r) {
  const nn::ModelOptions options{scalar_type_of(r.plan.precision.compute),
                                 scalar_type_of(r.plan.precision.residual)};
  out.model = nn::build_model(r.model.shape, options,
                              [&](const std::string& name) { return out.find(name); });
}

}  // namespace

param::Param ParallelModel::find(const std::string& parameter) const {
  for (const auto& store : stores)
    if (const auto index = store->find(parameter)) return {store.get(), *index};
  CAPSTAN_CHECK(false, "model {} has no parameter {}", name, parameter);
  return {};
}

ParallelModel parallelize(const plan::Plan& plan, const std::string& model, mesh::Mesh& mesh,
                          BucketHooks hooks) {
  const Request request{plan, plan.models.at(model), mesh, hooks};
  ParallelModel out;
  out.name = model;
  split_stages(out, request);
  split_tensors(out, request);
  split_context(request);
  split_experts(request);
  choose_recompute(request);
  store_flat(out, request);
  build_blocks(out, request);
  return out;
}

}  // namespace capstan::parallel
