// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// optimizer.in_backward changes when blocks are updated and where their gradients lie, and nothing
// else: the bits of weights and moments, reports and checkpoints are those of a run without it.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "capstan/base/error.h"
#include "capstan/checkpoint/saver.h"
#include "ranks/engine_fixture.h"
#include "support/run_ranks.h"
#include "support/temp_dir.h"

namespace capstan::engine::testing {
namespace {

using ::testing::HasSubstr;

TinyRun make_run(std::vector<std::string> overrides, int ranks = 1, int steps = 4) {
  TinyRun run{.ranks = ranks, .steps = steps, .overrides = std::move(overrides)};
  const std::string micro = "batch.micro_samples=" + std::to_string(8 / ranks);
  run.overrides.insert(run.overrides.end(), {"optimizer.max_grad_norm=none", micro});
  return run;
}
TinyRun in_backward(TinyRun run) {
  run.overrides.emplace_back("optimizer.in_backward=true");
  return run;
}

void with_worlds(const TinyRun& run,
                 const std::function<void(const comm::Communicator&, Engine&)>& fn) {
  const plan::Plan plan = make_tiny_plan(run);
  test::run_ranks(run.ranks, [&](const comm::Communicator& world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    fn(world, engine);
  });
}

struct Case {
  const char* name;
  std::vector<std::string> overrides;
};
const std::vector<std::string> kInt8 = {"precision.compute=fp32", "optimizer.moments=int8",
                                        "model.hidden_size=256", "model.intermediate_size=512",
                                        "model.initializer_range=0.05"};

std::vector<Case> cases() {
  return {
      {"fp64", {}},
      {"fp32", {"precision.compute=fp32"}},
      {"bf16_copy", {"precision.compute=bf16"}},
      {"fp16_fixed_scale", {"precision.compute=fp16", "precision.loss_scale=128"}},
      {"untied_biases", {"model.tie_word_embeddings=false", "model.attention_bias=true"}},
      {"tied", {"model.tie_word_embeddings=true"}},
      {"lion_bf16", {"precision.compute=fp32", "optimizer.name=lion", "optimizer.moments=bf16"}},
      {"adamw_bf16", {"precision.compute=fp32", "optimizer.moments=bf16"}},
      {"int8", kInt8},
      {"sophia", {"optimizer.name=sophia", "optimizer.sophia.interval=2"}},
      {"sophia_bf16",
       {"precision.compute=bf16", "optimizer.name=sophia", "optimizer.sophia.interval=1",
        "optimizer.moments=bf16", "model.tie_word_embeddings=true"}},
      {"frozen", {"model.frozen=['*', '!*.1.*']"}},
      {"kept_wide", {"precision.compute=bf16", "precision.keep_fp32=['*norm*']"}},
      {"recompute", {"parallel.recompute.mode=block"}},
      {"experts",
       {"model.family=moe", "model.experts.count=4", "model.experts.per_token=2",
        "model.experts.auxiliary_loss=0.02", "model.experts.bias_update_rate=0.01"}}};
}

class InBackward : public ::testing::TestWithParam<Case> {};

TEST_P(InBackward, SameBitsOnOneRank) {
  const TinyRun run = make_run(GetParam().overrides);
  const TinyResult behind = train(run), within = train(in_backward(run));
  EXPECT_EQ(within.hash, behind.hash);
  ASSERT_EQ(within.reports.size(), behind.reports.size());
  for (size_t i = 0; i < behind.reports.size(); ++i) {
    EXPECT_EQ(within.reports[i].loss, behind.reports[i].loss);
    EXPECT_EQ(within.reports[i].lr, behind.reports[i].lr);
    EXPECT_NEAR(within.reports[i].grad_norm / behind.reports[i].grad_norm, 1, 1e-12);
  }
}

// Two steps, the state moved to an engine of the other kind, two more: the bits of four steps.
TEST_P(InBackward, StateMovesBothWays) {
  const TinyRun behind = make_run(GetParam().overrides), within = in_backward(behind);
  const std::string whole = train(behind).hash;
  const auto objective = make_next_token_objective();
  const auto go_on = [&](Engine& engine, int64_t from, int64_t to) {
    for (int64_t step = from; step < to; ++step)
      (void)engine.step(make_batches(engine.plan(), 0, step), *objective);
  };
  for (const auto& [first, second] : {std::pair(behind, within), std::pair(within, behind)})
    with_engines(first, [&](int, Engine& from) {
      go_on(from, 0, 2);
      with_engines(second, [&](int, Engine& to) {
        auto source = from.state_entries(), target = to.state_entries();
        ASSERT_EQ(source.size(), target.size());
        for (size_t i = 0; i < source.size(); ++i) {
          ASSERT_EQ(source[i].kind + source[i].name, target[i].kind + target[i].name);
          target[i].tensor.copy_(source[i].tensor);
        }
        to.restore(from.scalars());
        go_on(to, 2, 4);
        EXPECT_EQ(to.weights_hash(), whole);
      });
    });
}

// The same through the files of a checkpoint.
TEST(InBackwardCheckpoint, LoadsInARunOfTheOtherKind) {
  for (const std::vector<std::string>& layout :
       {std::vector<std::string>{"parallel.zero.stage=0"},
        {"parallel.zero.stage=3", "precision.compute=bf16", "optimizer.moments=bf16"}}) {
    const TinyRun behind = make_run(layout, 2), within = in_backward(behind);
    const std::string whole = train(behind).hash;
    for (const auto& [first, second] : {std::pair(behind, within), std::pair(within, behind)}) {
      const test::TempDir folder;
      EngineScalars scalars;
      const auto objective = make_next_token_objective();
      const auto go_on = [&](Engine& engine, int rank, int64_t from) {
        for (int64_t step = from; step < from + 2; ++step)
          (void)engine.step(make_batches(engine.plan(), rank, step), *objective);
      };
      with_worlds(first, [&](const comm::Communicator& world, Engine& engine) {
        go_on(engine, world.rank(), 0);
        checkpoint::CommunicatorGroup group(world.control());
        checkpoint::SaveRequest request;
        request.directory = folder.path();
        request.step = 2;
        request.state = checkpoint::blobs_of(engine.state_entries());
        (void)checkpoint::save_step(request, group);
        if (world.rank() == 0) scalars = engine.scalars();
      });
      with_worlds(second, [&](const comm::Communicator& world, Engine& engine) {
        checkpoint::CommunicatorGroup group(world.control());
        const auto step =
            checkpoint::find_newest_good_step(folder.path(), checkpoint::Verify::kFull, group);
        auto blobs = checkpoint::blobs_of(engine.state_entries());
        (void)checkpoint::load_state(step.value(), blobs);
        engine.restore(scalars);
        go_on(engine, world.rank(), 2);
        EXPECT_EQ(engine.weights_hash(), whole) << layout.front();
      });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, InBackward, ::testing::ValuesIn(cases()),
                         [](const auto& one) { return std::string(one.param.name); });

// Sums over ranks are the same sums, issued one by one.
TEST(InBackwardOfRanks, IsTheRunWithoutIt) {
  const std::vector<std::pair<int, std::vector<std::string>>> layouts = {
      {2, {}},
      {2, {"model.tie_word_embeddings=true"}},
      {2, {"parallel.tensor=2", "parallel.sequence=true"}},
      {2, {"parallel.context.size=2"}},
      {4, {"parallel.tensor=2"}},
      {2, {"parallel.zero.stage=1"}},
      {2, {"parallel.zero.stage=2"}},
      {2, {"parallel.zero.stage=3"}},
      {2, {"parallel.zero.stage=3", "optimizer.name=sophia", "optimizer.sophia.interval=2"}},
      {4,
       {"parallel.zero.stage=1", "parallel.tensor=2", "optimizer.name=sophia",
        "optimizer.sophia.interval=2"}},
      {2, {"parallel.zero.stage=3", "parallel.zero.reshard_after_forward=false"}},
      {4, {"parallel.zero.stage=3", "parallel.zero.shard_size=2"}},
      {4, {"parallel.zero.stage=2", "parallel.zero.shard_size=2", "parallel.tensor=2"}},
      {4,
       {"model.family=moe", "model.experts.count=4", "model.experts.per_token=2",
        "parallel.expert=2", "parallel.zero.stage=1"}}};
  for (const auto& [ranks, layout] : layouts) {
    TinyRun run = make_run(layout, ranks);
    const int data = make_tiny_plan(run).grid.size_of(plan::AxisSet(plan::Axis::kDpShard) |
                                                      plan::Axis::kDpReplicate);
    run.overrides.push_back("batch.micro_samples=" + std::to_string(8 / data));
    const TinyResult behind = train(run), within = train(in_backward(run));
    EXPECT_EQ(within.hash, behind.hash) << ranks << " ranks " << layout.size();
    expect_same_run(within, behind, 1e-12);
  }
}

// Backwards of blocks, sums that are issued and updates, in the order of rank 0.
std::string order_of(int ranks) {
  std::string seen;
  TinyHooks hooks;
  hooks.hooks = [&](int rank) {
    EngineHooks made;
    if (rank > 0) return made;
    made.trace = [&](const char* what, int index) {
      if (what == std::string("backward")) seen += " b" + std::to_string(index);
      if (what == std::string("reduce")) seen += " s" + std::to_string(index);
    };
    made.after_reduce = [&](int bucket, const Tensor&) { seen += " u" + std::to_string(bucket); };
    return made;
  };
  TinyRun run = make_run({"model.tie_word_embeddings=false"}, ranks, 1);
  (void)train(in_backward(run), hooks);
  return seen;
}

// Alone before the backward of the block below it begins; else its sum travels meanwhile.
TEST(InBackwardOrder, BlocksAreUpdatedOnTheWay) {
  EXPECT_EQ(order_of(1), " b3 s0 u0 b2 s1 u1 b1 s2 u2 b0 s3 u3");
  EXPECT_EQ(order_of(2), " b3 s0 b2 s1 u0 b1 s2 u1 b0 s3 u2 u3");
}

TEST(InBackwardNonFinite, EndsTheRunAtOnce) {
  TinyHooks hooks;
  hooks.hooks = [](int) {
    EngineHooks made;
    made.before_reduce = [step = -1](int bucket, const Tensor& gradients) mutable {
      if (bucket == 0) ++step;
      if (bucket == 1 && step == 1) gradients.fill_(std::numeric_limits<double>::quiet_NaN());
    };
    return made;
  };
  const auto steps = [](int, Engine& engine) {
    const auto objective = make_next_token_objective();
    (void)engine.step(make_batches(engine.plan(), 0, 0), *objective);
    try {
      (void)engine.step(make_batches(engine.plan(), 0, 1), *objective);
      FAIL() << "a non-finite gradient went by";
    } catch (const DivergenceError& e) {
      EXPECT_THAT(e.what(), HasSubstr("training at step 2"));
      EXPECT_THAT(e.what(), HasSubstr("the last checkpoint is good"));
    }
  };
  with_engines(in_backward(make_run({})), steps, hooks);
}

// A step without targets changes nothing and does not count.
TEST(InBackwardVoid, StepWithoutTargetsIsSkipped) {
  const TinyRun run = in_backward(make_run({}));
  const auto objective = make_next_token_objective();
  with_engines(run, [&](int, Engine& engine) {
    (void)engine.step(make_batches(engine.plan(), 0, 0), *objective);
    const std::string before = engine.weights_hash();
    auto batches = make_batches(engine.plan(), 0, 1);
    for (MicroBatch& batch : batches) batch.targets_BT.fill_(-100);
    EXPECT_EQ(engine.step(batches, *objective).skipped, "no target tokens");
    EXPECT_EQ(engine.weights_hash(), before);
    EXPECT_EQ(engine.scalars().optimizer_count, 1);
    EXPECT_EQ(engine.scalars().step, 2);
  });
}

}  // namespace
}  // namespace capstan::engine::testing
