// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Training with linear layers in fp8: scales differ between layouts, so losses agree within what
// re-ordering a bf16 run does to it, not to the last bit; the same layout repeats bit for bit.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "capstan/checkpoint/saver.h"
#include "ranks/engine_fixture.h"

namespace capstan::engine::testing {
namespace {

// Sides are multiples of 16 on two tensor ranks and two parts of a row.
TinyRun fp8_run(const std::string& scaling, const std::vector<std::string>& more = {},
                int ranks = 1) {
  TinyRun run{.ranks = ranks, .steps = 6, .overrides = {}};
  for (const char* setting :
       {"precision.compute=bf16", "model.hidden_size=32", "model.intermediate_size=64",
        "model.head_dim=16", "batch.sequence_length=32", "optimizer.lr=3.0e-3"})
    run.overrides.emplace_back(setting);
  if (scaling != "none") run.overrides.push_back("precision.fp8.scaling=" + scaling);
  run.overrides.insert(run.overrides.end(), more.begin(), more.end());
  return run;
}

constexpr const char* kScalings[] = {"tensor", "row", "delayed"};

// Largest relative distance of losses.
double distance(const TinyResult& a, const TinyResult& b) {
  EXPECT_EQ(a.reports.size(), b.reports.size());
  double largest = 0;
  for (size_t i = 0; i < a.reports.size(); ++i) {
    EXPECT_EQ(a.reports[i].skipped, "");
    largest = std::max(largest, std::fabs(a.reports[i].loss / b.reports[i].loss - 1));
  }
  return largest;
}

TEST(Fp8Training, IsNotBf16_ButCloseToIt) {
  const TinyResult bf16 = train(fp8_run("none"));
  for (const char* scaling : kScalings)
    for (const char* gradients : {"e5m2", "e4m3"}) {
      const TinyResult fp8 =
          train(fp8_run(scaling, {std::string("precision.fp8.gradients=") + gradients}));
      EXPECT_NE(fp8.hash, bf16.hash);
      EXPECT_LE(distance(fp8, bf16), 0.01) << scaling << ", " << gradients;
      EXPECT_GT(distance(fp8, bf16), 0) << scaling << ", " << gradients;
    }
}

TEST(Fp8Training, FormatsAndScalings_AreRunsOfTheirOwn) {
  std::vector<std::string> hashes;
  for (const char* scaling : kScalings)
    for (const char* gradients : {"e5m2", "e4m3"})
      hashes.push_back(
          train(fp8_run(scaling, {std::string("precision.fp8.gradients=") + gradients})).hash);
  hashes.push_back(train(fp8_run("delayed", {"precision.fp8.history=1"})).hash);
  std::sort(hashes.begin(), hashes.end());
  EXPECT_EQ(std::unique(hashes.begin(), hashes.end()), hashes.end());
}

TEST(Fp8Training, AnyLayout_StaysWithinTheSpread) {
  struct Layout {
    int ranks;
    std::vector<std::string> settings;
  };
  const Layout layouts[] = {
      {2, {"parallel.data=2"}},
      {2, {"parallel.zero.stage=3"}},
      {2, {"parallel.tensor=2"}},
      {2, {"parallel.tensor=2", "parallel.sequence=true"}},
      {2, {"parallel.tensor=2", "parallel.sequence=true", "parallel.sequence_overlap=true"}},
      {2, {"parallel.context.size=2"}},
      {2, {"parallel.pipeline.size=2", "parallel.pipeline.schedule=zero_bubble"}}};
  for (const char* scaling : kScalings) {
    const TinyResult one = train(fp8_run(scaling));
    double spread = 0;  // of one rank that takes the same samples in other groups
    for (const char* micro_samples : {"1", "4", "8"})
      spread = std::max(
          spread,
          distance(train(fp8_run(scaling, {std::string("batch.micro_samples=") + micro_samples})),
                   one));
    EXPECT_LE(spread, 0.02) << scaling;
    for (const Layout& layout : layouts) {
      const TinyResult other = train(fp8_run(scaling, layout.settings, layout.ranks));
      // Tensor ranks round their parts of a sum to bf16 too, which no grouping of samples does.
      const bool cuts_sums = layout.settings.front() == "parallel.tensor=2";
      EXPECT_LE(distance(other, one), (cuts_sums ? 3 : 2) * spread)
          << scaling << ", " << layout.settings.back() << ", spread " << spread;
    }
  }
}

// Each rank sees maxima of its own rows or features; the history has those of all.
TEST(Fp8Training, EveryRankHasTheMaximaOfAll) {
  for (const char* layout : {"parallel.data=2", "parallel.tensor=2"}) {
    std::mutex mutex;
    std::vector<Tensor> histories;
    with_engines(fp8_run("delayed", {layout}, 2), [&](int rank, Engine& engine) {
      const auto objective = make_next_token_objective();
      const int data_rank = engine.plan().grid.data_parallel_index(rank);
      for (int64_t step = 0; step < 2; ++step)
        (void)engine.step(make_batches(engine.plan(), data_rank, step), *objective);
      for (const auto& entry : engine.state_entries()) {
        const std::lock_guard lock(mutex);
        if (entry.kind == "fp8") histories.push_back(entry.tensor.cpu().clone());
      }
    });
    ASSERT_EQ(histories.size(), 2U) << layout;
    EXPECT_TRUE(histories[0].equal(histories[1])) << layout;
  }
}

// What only moves or repeats work changes no bit: scales come from the same numbers.
TEST(Fp8Training, RecomputeAndOffload_ChangeNothing) {
  for (const char* scaling : kScalings) {
    const TinyResult plain = train(fp8_run(scaling));
    for (const std::vector<std::string>& settings :
         std::vector<std::vector<std::string>>{{"parallel.recompute.mode=block"},
                                               {"parallel.recompute.mode=selective",
                                                "parallel.recompute.parts=[attention, mlp, norm]"},
                                               {"parallel.offload_activations=true"}})
      EXPECT_EQ(train(fp8_run(scaling, settings)).hash, plain.hash)
          << scaling << ", " << settings.back();
  }
}

// Sophia's own pass takes its products in fp8 too, and leaves a state that repeats.
TEST(Fp8Training, Sophia_IsCloseToItsRunInBf16) {
  const std::vector<std::string> sophia = {"optimizer.name=sophia", "optimizer.sophia.interval=2",
                                           "optimizer.lr=1.0e-3"};
  const TinyResult bf16 = train(fp8_run("none", sophia));
  auto recomputes = sophia;
  recomputes.emplace_back("parallel.recompute.mode=block");
  for (const char* scaling : kScalings) {
    const TinyResult fp8 = train(fp8_run(scaling, sophia));
    EXPECT_LE(distance(fp8, bf16), 0.02) << scaling;
    EXPECT_GT(distance(fp8, bf16), 0) << scaling;
    EXPECT_EQ(train(fp8_run(scaling, recomputes)).hash, fp8.hash) << scaling;
    auto layout = sophia;
    layout.emplace_back("parallel.zero.stage=3");
    EXPECT_LE(distance(train(fp8_run(scaling, layout, 2)), fp8), 0.02) << scaling;
  }
}

TEST(Fp8Training, WeightsThatAreKeptWide_TakeNoPart) {
  const std::vector<std::string> kept{"precision.keep_fp32=['*_proj*']"};
  EXPECT_EQ(train(fp8_run("tensor", kept)).hash, train(fp8_run("none", kept)).hash);
}

// Resume: everything a run knows is in the state entries and scalars. Evaluation between steps
// leaves no trace.
TEST(Fp8Training, ResumeIsBitwise) {
  for (const char* scaling : kScalings) {
    const TinyRun run = fp8_run(scaling, {"precision.fp8.gradients=e4m3"}, 2);
    with_engines(run, [&](int rank, Engine& engine) {
      const auto objective = make_next_token_objective();
      const auto batches = [&](int64_t step) { return make_batches(engine.plan(), rank, step); };
      for (int64_t step = 0; step < 3; ++step) (void)engine.step(batches(step), *objective);
      const checkpoint::HostState state(engine.state_entries());
      std::vector<std::vector<std::byte>> saved;
      for (const auto& blob : state.blobs())
        saved.emplace_back(blob.bytes.begin(), blob.bytes.end());
      const EngineScalars scalars = engine.scalars();
      const auto rest = [&](bool evaluates) {
        std::string losses;
        for (int64_t step = 3; step < 6; ++step) {
          if (evaluates)
            for (const auto& batch : batches(9)) engine.evaluate(batch);
          losses += std::to_string(engine.step(batches(step), *objective).loss) + " ";
        }
        return losses + engine.weights_hash();
      };
      const std::string first = rest(true);
      auto blobs = state.blobs();
      for (size_t i = 0; i < saved.size(); ++i)
        std::copy(saved[i].begin(), saved[i].end(), blobs[i].bytes.begin());
      state.write_back();
      engine.restore(scalars);
      EXPECT_EQ(rest(false), first) << scaling;
    });
  }
}

// Maxima of all ranks, the same on each, in one entry that one rank writes.
TEST(Fp8Training, DelayedHistory_IsPartOfTheState) {
  with_engines(fp8_run("delayed", {"parallel.tensor=2", "precision.fp8.history=3"}, 2),
               [](int rank, Engine& engine) {
                 const auto objective = make_next_token_objective();
                 for (int64_t step = 0; step < 2; ++step)
                   (void)engine.step(make_batches(engine.plan(), 0, step), *objective);
                 const auto entries = engine.state_entries();
                 const auto found = std::find_if(entries.begin(), entries.end(),
                                                 [](const auto& e) { return e.kind == "fp8"; });
                 ASSERT_NE(found, entries.end());
                 EXPECT_EQ(found->writes, rank == 0);
                 EXPECT_EQ(found->global_shape, (plan::Shape{3, 14, 2}));
                 const Tensor history = found->tensor.view({3, 14, 2});
                 // Per layer q k v o gate up down: what is multiplied jointly is the first's.
                 const Tensor used = history.gt(0).to(at::kLong).sum({2});
                 EXPECT_EQ(used.sum(1)[0].item<int64_t>(), 2 * 4 * 2);
                 EXPECT_EQ(used.sum(1)[1].item<int64_t>(), 2 * 4 * 2);
                 EXPECT_EQ(used.sum(1)[2].item<int64_t>(), 0);
               });
}

}  // namespace
}  // namespace capstan::engine::testing
