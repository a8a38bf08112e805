// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Offload on the fake device: the bits of the run without it, copies that are ordered by events
// alone, memory that leaves the device as the plan says.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/parallel/activation_offload.h"
#include "parallel/host_arena_internal.h"
#include "ranks/device_runs.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/memory.h"

namespace capstan::engine::testing {
namespace {

using parallel::ActivationOffload;
using parallel::HostArena;
using parallel::HostLink;

class TheDevice : public ::testing::Environment {
 public:
  void SetUp() override { test::install_fake_device(); }
};
const auto* const device = ::testing::AddGlobalTestEnvironment(new TheDevice);

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

TEST(HostArena, TooMuchIsRefused) {
  HostArena arena(test::install_fake_device());
  try {
    (void)arena.take(int64_t{1} << 52);
    FAIL() << "4 PiB of pinned memory";
  } catch (const EnvError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("PiB more beside 0 B"));
    EXPECT_THAT(error.what(), ::testing::HasSubstr("parallel.offload_activations"));
  }
  EXPECT_EQ(arena.take(100).bytes, 512);
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
    if (step == 0) pinned = link_.arena()->reserved_bytes();
    EXPECT_EQ(link_.arena()->reserved_bytes(), pinned);
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
    const DeviceOutcome got = run_on_device(with(run, "precision.compute=fp32"));
    EXPECT_EQ(got.waits, 0) << test::last_host_syncs(got.waits);
  }
}

plan::MemoryReport reported(const TinyRun& run) {
  plan::Plan plan = make_tiny_plan(run);
  plan.resolved.run.device = "cuda";
  return plan::report_memory(plan, 0);
}

// Device memory of a GPU by the plan.
int64_t predicted(const TinyRun& run) {
  const plan::MemoryReport m = reported(run);
  return m.needed() - m.device;
}

void expect_saved_as_planned(TinyRun run, const std::vector<std::string>& offload) {
  const int64_t plain = run_on_device(run).peak, plain_by_plan = predicted(run);
  run.overrides.insert(run.overrides.end(), offload.begin(), offload.end());
  const auto saved = static_cast<double>(plain - run_on_device(run).peak),
             saved_by_plan = static_cast<double>(plain_by_plan - predicted(run));
  EXPECT_NEAR(saved, saved_by_plan, saved_by_plan / 10) << offload.back();
  std::printf("%s: %.2f of %.2f MiB saved, by the plan %.2f of %.2f\n", offload.back().c_str(),
              saved / 1048576, static_cast<double>(plain) / 1048576, saved_by_plan / 1048576,
              static_cast<double>(plain_by_plan) / 1048576);
}

std::vector<std::string> wide_model() {
  return {"model.hidden_size=64",   "model.intermediate_size=128", "model.num_hidden_layers=8",
          "precision.compute=bf16", "batch.micro_samples=8",       "batch.sequence_length=128",
          "parallel.zero.stage=1"};
}

// On the device are two blocks at most, the one that computes and the one whose tensors leave or
// arrive.
TEST(DeviceOffload, MemoryIsWhatThePlanSays) {
  const TinyRun run{.steps = 3, .overrides = wide_model()};
  const std::string activations = "parallel.offload_activations=true";
  expect_saved_as_planned(run, {activations});
  expect_saved_as_planned(run, {"parallel.zero.offload=optimizer"});
  TinyRun again = run;
  again.overrides.emplace_back("parallel.recompute.mode=block");
  expect_saved_as_planned(again, {activations});
}

// Slabs are the only pieces of 1 MiB and more: what batches pass through is less. Activations are
// counted for whole layers of tensors that are rounded up, so there may be one slab too many.
TEST(DeviceOffload, PinnedMemoryIsWhatThePlanSays) {
  const std::string states = "parallel.zero.offload=optimizer",
                    activations = "parallel.offload_activations=true";
  for (const auto& offload :
       {std::vector<std::string>{states}, {activations}, {states, activations}}) {
    TinyRun run{.overrides = wide_model()};
    run.overrides.insert(run.overrides.end(), offload.begin(), offload.end());
    int64_t pinned = 0;
    with_engines(run, [&](int rank, Engine& engine) {
      const test::BackwardOnThisThread here;
      for (int step = 0; step < 2; ++step)
        (void)engine.step(make_batches(engine.plan(), rank, step), *make_next_token_objective());
      pinned = test::fake::pinned_bytes(kMiB);
    });
    const plan::MemoryReport m = reported(run);
    const int64_t moments = offload.front() == states ? m.optimizer : 0;
    const int64_t by_plan = m.host_taken - m.checkpoint_snapshot - moments;
    EXPECT_GE(by_plan, pinned) << offload.front();
    EXPECT_LE(by_plan, offload.back() == states ? pinned : 2 * pinned) << offload.back();
  }
}

std::vector<TinyRun> runs_by_the_host() {
  const auto zero = [](int stage, const std::string& offload, const std::string& more) {
    return TinyRun{.ranks = 2,
                   .overrides = {"parallel.zero.stage=" + std::to_string(stage),
                                 "parallel.zero.offload=" + offload, more}};
  };
  return {
      {.overrides = {"parallel.zero.offload=optimizer"}},
      {.overrides = {"parallel.zero.offload=optimizer", "optimizer.max_grad_norm=none"}},
      {.overrides = {"parallel.zero.offload=optimizer", "optimizer.name=sophia",
                     "optimizer.sophia.interval=2"}},
      {.ranks = 2,
       .overrides = {"parallel.zero.offload=optimizer", "parallel.pipeline.size=2",
                     "model.tie_word_embeddings=true"}},
      zero(1, "optimizer", "parallel.offload_activations=true"),
      zero(2, "optimizer", "parallel.zero.reduce=micro_batch"),
      zero(3, "optimizer", "parallel.zero.reduce=micro_batch"),
      zero(3, "all", "parallel.zero.prefetch=2"),
      zero(3, "all", "parallel.zero.reshard_after_forward=false"),
  };
}

// The same numbers, summed and rounded in another place.
TEST(DeviceOffload, TheOptimizerOnTheHostIsTheOneOnTheDevice) {
  for (TinyRun run : runs_by_the_host()) {
    SCOPED_TRACE(run.overrides.front() + " " + run.overrides.back());
    const DeviceOutcome got = run_on_device(run);
    run.overrides.emplace_back("parallel.zero.offload=none");
    const DeviceOutcome want = run_on_device(run);
    ASSERT_EQ(got.reports.size(), want.reports.size());
    for (size_t i = 0; i < got.reports.size(); ++i) {
      EXPECT_NEAR(got.reports[i].loss, want.reports[i].loss, 1e-11);
      EXPECT_NEAR(got.reports[i].grad_norm, want.reports[i].grad_norm, 1e-11);
    }
  }
}

double loss_of(Engine& engine, int rank) {
  for (const MicroBatch& batch : make_batches(engine.plan(), rank, 3)) engine.evaluate(batch);
  return engine.report_eval().loss();
}

// What the optimizer rounds on the host is what the device reads.
TEST(DeviceOffload, RoundedValuesComeBack) {
  for (const char* zero : {"parallel.zero.stage=0", "parallel.zero.stage=3"})
    for (const char* offload : {"optimizer", "all"}) {
      if (std::string(offload) == "all" && std::string(zero).back() != '3') continue;
      const TinyRun run{.overrides = {"precision.compute=bf16", zero,
                                      std::string("parallel.zero.offload=") + offload}};
      with_engines(run, [](int rank, Engine& engine) {
        const test::BackwardOnThisThread here;
        const double first = loss_of(engine, rank);
        for (int step = 0; step < 3; ++step)
          (void)engine.step(make_batches(engine.plan(), rank, step), *make_next_token_objective());
        const double trained = loss_of(engine, rank);
        EXPECT_NE(trained, first);
        engine.restore(engine.scalars());  // rounds all weights again
        EXPECT_EQ(loss_of(engine, rank), trained);
      });
    }
}

// Gradients leave while the backward goes on: that of a block when the next but one begins at the
// latest. The host waits once for each of them and for each sent value, and for the loss.
TEST(DeviceOffload, GradientsLeaveDuringTheBackward) {
  const TinyRun run{.overrides = {"parallel.zero.offload=optimizer", "model.num_hidden_layers=6",
                                  "batch.micro_samples=8", "model.tie_word_embeddings=false"}};
  std::vector<std::string> events;
  TinyHooks hooks;
  hooks.hooks = [&](int) {
    EngineHooks made;
    made.trace = [&](const char* what, int index) {
      if (std::string(what) == "backward") events.push_back("backward " + std::to_string(index));
    };
    made.after_reduce = [&](int, const Tensor&) { events.emplace_back("leaves"); };
    return made;
  };
  with_engines(
      run,
      [&](int rank, Engine& engine) {
        const test::BackwardOnThisThread here;
        for (int step = 0; step < 3; ++step) {
          events.clear();
          const auto batches = make_batches(engine.plan(), rank, step);
          const int64_t before = test::host_syncs();
          (void)engine.step(batches, *make_next_token_objective());
          const auto stores = std::count(events.begin(), events.end(), "leaves");
          const int64_t waits = test::host_syncs() - before;
          if (step > 0) {
            EXPECT_EQ(waits, 2 * stores + 1) << test::last_host_syncs(waits);
          }
        }
      },
      hooks);
  const auto first = std::find(events.begin(), events.end(), "leaves");
  ASSERT_NE(first, events.end());
  EXPECT_EQ(*(first - 1), "backward 6") << "the head's gradient leaves behind the last layer's";
  EXPECT_LE(std::count(first, events.end(), "leaves"), 8);
  EXPECT_GE(std::count(first, std::find(first, events.end(), "backward 0"), "leaves"), 6);
}

}  // namespace
}  // namespace capstan::engine::testing
