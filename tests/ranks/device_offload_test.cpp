// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Offload on the fake device: the bits of the run without it, copies that are ordered by events
// alone, memory that leaves the device as the plan says.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <mutex>

#include "capstan/parallel/activation_offload.h"
#include "parallel/host_arena_internal.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/run_ranks.h"

namespace capstan::engine::testing {
namespace {

using parallel::ActivationOffload;
using parallel::HostArena;
using parallel::HostLink;

at::TensorOptions on_device() { return at::TensorOptions().device(test::fake_device()); }
int64_t allocated() { return test::install_fake_device().memory().allocated_bytes; }

TEST(HostArena, PlacesAreCutReusedAndJoined) {
  HostArena arena(test::install_fake_device());
  const auto a = arena.take(1000), b = arena.take(1), c = arena.take(5000);
  EXPECT_EQ(a.bytes, 1024);
  EXPECT_EQ(b.begin, 1024);
  EXPECT_EQ(c.begin, 1536);
  const int64_t reserved = arena.reserved_bytes();
  arena.memory(b).fill_(7);
  EXPECT_EQ(arena.memory(b).numel(), 512);
  arena.give_back(a);
  arena.give_back(c);
  arena.give_back(b);  // between two holes
  const auto all = arena.take(reserved);
  EXPECT_EQ(all.begin, 0);
  EXPECT_EQ(arena.reserved_bytes(), reserved);
  EXPECT_EQ(arena.take(3 * reserved).slab, 1U);
  EXPECT_EQ(arena.reserved_bytes(), reserved + 4 * reserved);
}

class OffloadToTheHost : public ::testing::Test {
 protected:
  HostLink link_{test::install_fake_device()};
  ActivationOffload offload_{&link_};
};

TEST_F(OffloadToTheHost, DeviceMemoryIsLetGoWhenTheNextBlockIsThrough) {
  const at::Tensor expected = at::arange(4096, at::kFloat);
  const int64_t before = allocated(), waits = test::host_syncs();
  at::Tensor x = expected.to(test::fake_device(), /*non_blocking=*/false);
  const auto kept = offload_.copy(x);
  const auto block = offload_.end_block();
  x = at::Tensor();
  EXPECT_EQ(allocated() - before, 16384);
  const auto next = offload_.copy(at::ones({1024}, on_device()));
  const auto next_block = offload_.end_block();
  EXPECT_EQ(allocated() - before, 4096);
  offload_.fetch(next_block.get());  // still here
  EXPECT_EQ(allocated() - before, 4096);
  offload_.fetch(block.get());
  EXPECT_EQ(allocated() - before, 4096 + 16384);
  const at::Tensor back = kept->get();
  EXPECT_TRUE(kept->get().is_same(back) || kept->get().data_ptr() == back.data_ptr());
  EXPECT_EQ(allocated() - before, 4096 + 16384);
  EXPECT_EQ(test::host_syncs() - waits, 1);  // of x
  EXPECT_TRUE(at::equal(back.cpu(), expected));
  EXPECT_TRUE(at::equal(next->get().cpu(), at::ones({1024})));
}

TEST_F(OffloadToTheHost, StridesGapsAndTypesSurvive) {
  const at::Tensor x = at::arange(4096, on_device().dtype(at::kFloat)).view({64, 64});
  const std::vector<at::Tensor> tensors = {x.t(),
                                           x.narrow(1, 8, 16),
                                           x.narrow(0, 8, 16),
                                           x.to(at::kBFloat16),
                                           x.gt(17),
                                           x.narrow(0, 0, 1).expand({5, 64})};
  std::vector<std::shared_ptr<parallel::HostCopy>> kept;
  for (const at::Tensor& tensor : tensors) kept.push_back(offload_.copy(tensor));
  const auto block = offload_.end_block();
  (void)offload_.copy(x);
  (void)offload_.end_block();
  for (size_t i = 0; i < kept.size(); ++i)
    EXPECT_TRUE(at::equal(kept[i]->get().cpu(), tensors[i].cpu())) << i;
  EXPECT_EQ(kept[0]->get().strides(), tensors[0].strides());
  EXPECT_EQ(kept[4]->get().scalar_type(), at::kBool);
}

// Every step takes the pinned memory of the one before, behind the copies that read it.
TEST_F(OffloadToTheHost, PinnedMemoryIsUsedAgain) {
  int64_t pinned = 0;
  for (int step = 0; step < 4; ++step) {
    std::vector<std::shared_ptr<parallel::HostCopy>> kept;
    std::vector<std::shared_ptr<parallel::OffloadedBlock>> blocks;
    for (int block = 0; block < 3; ++block) {
      kept.push_back(offload_.copy(at::full({1 << 17}, 10 * step + block, on_device())));
      blocks.push_back(offload_.end_block());
    }
    for (size_t block = 3; block-- > 0;) {
      offload_.fetch(blocks[block].get());
      if (block > 0) offload_.fetch(blocks[block - 1].get());
      EXPECT_EQ(kept[block]->get().max().cpu().item<double>(), 10 * step + static_cast<int>(block));
      kept.pop_back();
    }
    if (step == 0) pinned = offload_.pinned_bytes();
    EXPECT_EQ(offload_.pinned_bytes(), pinned);
  }
}

// As when a step fails: memory goes to others behind the copies.
TEST_F(OffloadToTheHost, WhatIsDroppedUnreadIsNotGivenAwayTooEarly) {
  const auto filled = [](int64_t n) { return at::ones({n}, on_device()); };
  auto first = offload_.copy(filled(2048));
  auto first_block = offload_.end_block();
  auto second = offload_.copy(filled(4096));
  auto second_block = offload_.end_block();
  offload_.fetch(second_block.get());  // still here
  second.reset();
  EXPECT_NO_THROW((void)filled(4096));
  offload_.fetch(first_block.get());
  first.reset();
  EXPECT_NO_THROW((void)filled(2048));
  EXPECT_NO_THROW((void)offload_.copy(filled(2048)));  // into the pinned memory of the first
  first_block.reset();
  second_block.reset();
  EXPECT_NO_THROW((void)filled(4096));
  EXPECT_NO_THROW((void)filled(2048));
}

struct Outcome {
  std::vector<StepReport> reports;
  std::string hash;
  int64_t waits = 0;  // of the host, from the third step on
  int64_t peak = 0;   // device memory above what was there before
};

Outcome run_on_device(const TinyRun& run) {
  const plan::Plan plan = make_tiny_plan(run);
  device::Accelerator& gpu = test::install_fake_device();
  Outcome out;
  std::mutex mutex;
  const auto on_rank = [&](comm::Communicator world) {
    const test::BackwardOnThisThread here;
    const int64_t before = gpu.memory().allocated_bytes;
    gpu.reset_peak();
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    std::vector<StepReport> reports;
    int64_t waits = 0;
    for (int step = 0; step < run.steps; ++step) {
      if (step == 2) waits = test::host_syncs();
      engine.start_step(make_batches(plan, mesh.grid().data_parallel_index(world.rank()), step),
                        *make_next_token_objective());
      if (engine.unreported_steps() > 1) reports.push_back(engine.finish_step());
    }
    while (engine.unreported_steps() > 0) reports.push_back(engine.finish_step());
    waits = test::host_syncs() - waits;
    const int64_t peak = gpu.memory().peak_bytes - before;
    const std::string hash = engine.weights_hash();
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) out = {reports, hash, waits, peak};
  };
  // Ranks alone do not communicate by NCCL.
  run.ranks == 1 ? test::run_ranks(1, on_rank) : test::run_device_ranks(run.ranks, on_rank);
  return out;
}

void expect_same_bits(const Outcome& got, const Outcome& want) {
  EXPECT_EQ(got.hash, want.hash);
  ASSERT_EQ(got.reports.size(), want.reports.size());
  for (size_t i = 0; i < got.reports.size(); ++i) {
    EXPECT_EQ(got.reports[i].loss, want.reports[i].loss);
    EXPECT_EQ(got.reports[i].grad_norm, want.reports[i].grad_norm);
  }
}

// Tensors of these runs are large enough to travel.
TinyRun with(TinyRun run, const std::string& more) {
  run.overrides.insert(run.overrides.begin(),
                       {"batch.sequence_length=24", "model.num_hidden_layers=4"});
  run.overrides.push_back(more);
  return run;
}

TEST(DeviceOffload, ActivationsOnTheHostChangeNoBit) {
  const std::vector<TinyRun> runs = {
      {},
      {.overrides = {"precision.compute=bf16", "model.head_dim=16", "data.documents=separate"}},
      {.overrides = {"parallel.recompute.mode=block"}},
      {.overrides = {"parallel.recompute.mode=selective",
                     "parallel.recompute.parts=[attention, mlp, norm]"}},
      {.overrides = {"model.family=gpt2", "model.num_key_value_heads=4"}},
      {.overrides = {"model.family=moe", "model.experts.count=4", "model.experts.per_token=2"}},
      {.ranks = 2, .overrides = {"parallel.pipeline.size=2"}},
      {.ranks = 2, .overrides = {"parallel.pipeline.size=2", "parallel.pipeline.schedule=gpipe"}},
      {.ranks = 2,
       .overrides = {"parallel.pipeline.size=2", "parallel.pipeline.schedule=zero_bubble",
                     "parallel.pipeline.chunks=2"}},
      {.ranks = 2, .overrides = {"parallel.tensor=2", "parallel.sequence=true"}}};
  for (const TinyRun& run : runs) {
    SCOPED_TRACE(run.overrides.empty() ? "plain" : run.overrides.back());
    expect_same_bits(run_on_device(with(run, "parallel.offload_activations=true")),
                     run_on_device(with(run, "parallel.offload_activations=false")));
  }
}

TEST(DeviceOffload, TheHostWaitsForNoActivation) {
  for (const char* more : {"parallel.recompute.mode=none", "parallel.recompute.mode=block"}) {
    const TinyRun run{.overrides = {more, "parallel.offload_activations=true"}};
    const Outcome got = run_on_device(with(run, "precision.compute=fp32"));
    EXPECT_EQ(got.waits, 0) << test::last_host_syncs(got.waits);
  }
}

// On the device are two blocks at most, the one that computes and the one whose tensors leave or
// arrive: what the plan says for a GPU.
TEST(DeviceOffload, MemoryIsWhatThePlanSays) {
  const std::vector<std::string> model = {
      "model.hidden_size=64",        "model.intermediate_size=128", "model.num_hidden_layers=8",
      "precision.compute=bf16",      "batch.micro_samples=8",       "batch.sequence_length=128",
      "optimizer.max_grad_norm=none"};
  for (const char* recompute : {"none", "block"}) {
    SCOPED_TRACE(recompute);
    TinyRun run{.steps = 3, .overrides = model};
    run.overrides.push_back(std::string("parallel.recompute.mode=") + recompute);
    const auto predicted = [](const TinyRun& of) {
      plan::Plan plan = make_tiny_plan(of);
      plan.resolved.run.device = "cuda";
      const plan::MemoryReport m = plan::report_memory(plan, 0);
      return m.needed() - m.device;
    };
    TinyRun offloaded = run;
    offloaded.overrides.emplace_back("parallel.offload_activations=true");
    const int64_t plain = run_on_device(run).peak, saved = plain - run_on_device(offloaded).peak;
    const int64_t saved_by_plan = predicted(run) - predicted(offloaded);
    std::printf("%s: plain %.2f MiB (plan %.2f), saved %.2f (plan %.2f)\n", recompute,
                static_cast<double>(plain) / 1048576, static_cast<double>(predicted(run)) / 1048576,
                static_cast<double>(saved) / 1048576, static_cast<double>(saved_by_plan) / 1048576);
    EXPECT_NEAR(static_cast<double>(saved), static_cast<double>(saved_by_plan),
                static_cast<double>(saved_by_plan) / 10);
  }
}

}  // namespace
}  // namespace capstan::engine::testing
