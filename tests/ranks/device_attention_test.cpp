// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Runs whose attention is FlashAttention on the fake device, in fp32 the memory-efficient kernel,
// with documents and without, against the CPU's.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <mutex>

#include "capstan/base/log.h"
#include "capstan/device/accelerator.h"
#include "engine/attention_note_internal.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/run_ranks.h"

namespace capstan::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;

std::vector<std::string> narrow(std::vector<std::string> more = {}) {
  more.insert(more.begin(), {"precision.compute=bf16", "model.head_dim=16"});
  return more;
}
const std::string kSeparate = "data.documents=separate";

struct Case {
  std::string name;
  int ranks;
  std::vector<std::string> overrides;
  bool uses_lengths;
  bool fp32 = false;

  [[nodiscard]] std::vector<std::string> in_type(std::vector<std::string> list) const {
    list = narrow(std::move(list));
    if (fp32) list.front() = "precision.compute=fp32";
    return list;
  }
};
std::vector<Case> cases() {
  const std::string two = "parallel.context.size=2", four = "parallel.context.size=4";
  const std::string longer = "batch.sequence_length=48";
  return {
      {"documents", 1, {kSeparate}, true},
      {"window", 1, {kSeparate, "model.sliding_window=5"}, true},
      {"recompute", 1, {kSeparate, "parallel.recompute.mode=block"}, true},
      {"offload", 1, {kSeparate, "parallel.offload_activations=true"}, true},
      {"all to all", 2, {kSeparate, two, "parallel.context.method=all_to_all"}, true},
      {"ring", 2, {kSeparate, two}, true},
      {"ring of four", 4, {kSeparate, four, longer}, true},
      {"ring, window", 2, {kSeparate, two, "model.sliding_window=5"}, true},
      {"ring, recompute", 2, {kSeparate, two, "parallel.recompute.mode=block"}, true},
      {"fp32", 1, {}, true, true},
      {"fp32, window", 1, {"model.sliding_window=5"}, true, true},
      {"fp32, documents", 1, {kSeparate}, true, true},
      {"fp32, documents and window", 1, {kSeparate, "model.sliding_window=5"}, true, true},
      {"fp32, ring", 2, {two}, true, true},
      {"fp32, all to all", 2, {kSeparate, two, "parallel.context.method=all_to_all"}, true, true}};
}

// Its rows lie on different ranks: losses are those of the run of one rank.
TinyRun on_one_rank(const Case& c) {
  TinyRun run{.overrides = c.in_type({})};
  for (const std::string& set : c.overrides)
    if (set.starts_with("model.") || set.starts_with("batch.") || set == kSeparate)
      run.overrides.push_back(set);
  return run;
}

std::map<std::string, TinyResult>& on_the_cpu() {
  static std::map<std::string, TinyResult> results;
  return results;
}
class OnTheCpu : public ::testing::Environment {
 public:
  void SetUp() override {
    for (const Case& c : cases()) on_the_cpu()[c.name] = testing::train(on_one_rank(c));
    test::install_fake_device();
  }
};
const auto* const cpu = ::testing::AddGlobalTestEnvironment(new OnTheCpu);

std::vector<StepReport> train_on_device(const TinyRun& run) {
  const plan::Plan plan = testing::make_tiny_plan(run);
  std::vector<StepReport> reports;
  std::mutex mutex;
  const auto run_ranks = [&](const auto& fn) {
    // Ranks alone do not communicate by NCCL.
    run.ranks == 1 ? test::run_ranks(1, fn) : test::run_device_ranks(run.ranks, fn);
  };
  run_ranks([&](comm::Communicator world) {
    const test::BackwardOnThisThread here;
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    for (int step = 0; step < run.steps; ++step) {
      const StepReport report =
          engine.step(make_batches(plan, mesh.grid().data_parallel_index(world.rank()), step),
                      *make_next_token_objective());
      const std::lock_guard lock(mutex);
      if (world.rank() == 0) reports.push_back(report);
    }
  });
  return reports;
}

TEST(DeviceAttention, RunsAreCloseToThoseOfTheCpu) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const int64_t before = test::calls_with_lengths();
    const auto got = train_on_device({.ranks = c.ranks, .overrides = c.in_type(c.overrides)});
    EXPECT_EQ(test::calls_with_lengths() > before, c.uses_lengths);
    const auto& want = on_the_cpu().at(c.name).reports;
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_NEAR(got[i].loss / want[i].loss, 1, c.fp32 ? 1e-5 : 5e-3);
      EXPECT_NEAR(got[i].grad_norm / want[i].grad_norm, 1, c.fp32 ? 1e-4 : 3e-2);
    }
  }
}

void expect_no_waits(Engine& engine, int rank) {
  const test::BackwardOnThisThread here;
  const auto objective = make_next_token_objective();
  int64_t waits = 0;
  for (int step = 0; step < 6; ++step) {
    if (step == 2) waits = test::host_syncs_of_thread();
    engine.start_step(make_batches(engine.plan(), rank, step), *objective);
    if (engine.unreported_steps() > 1) (void)engine.finish_step();
  }
  waits = test::host_syncs_of_thread() - waits;
  EXPECT_EQ(waits, 0) << test::last_host_syncs(waits);
  (void)engine.finish_step();
}

TEST(DeviceAttention, TheHostNeverWaitsForDocuments) {
  testing::with_engines({.overrides = narrow({kSeparate})},
                        [](int rank, Engine& engine) { expect_no_waits(engine, rank); });
  // By kernels, and by the reference, which fp64 takes.
  for (const char* type : {"bf16", "fp64"}) {
    TinyRun run{.ranks = 2, .overrides = narrow({kSeparate, "parallel.context.size=2"})};
    run.overrides.front() = std::string("precision.compute=") + type;
    const plan::Plan plan = testing::make_tiny_plan(run);
    test::run_device_ranks(2, [&](const comm::Communicator& world) {
      mesh::Mesh mesh(world, plan.grid);
      Engine engine(plan, mesh);
      expect_no_waits(engine, 0);
    });
  }
}

// Documents of `length` tokens each.
std::vector<MicroBatch> batches_of(const plan::Plan& plan, int64_t step, int64_t length) {
  auto batches = make_batches(plan, 0, step);
  const Tensor places_T = at::arange(plan.batch.sequence_length, at::kInt);
  const Tensor first_T = places_T.sub(places_T.remainder(length));
  for (MicroBatch& batch : batches) {
    batch.rows.first_key_BT.copy_(first_T);
    batch.rows.positions_BT.copy_(places_T.sub(first_T));
  }
  return batches;
}

// 12 tokens a row, two rows: places for 2, then 8, then again 2, then 16 documents.
constexpr int64_t kLengths[] = {12, 12, 12, 3, 3, 3, 12, 2, 2, 2};

TEST(DeviceAttention, AGraphIsRecordedAgain_WhenDocumentsGrowInNumber) {
  const auto run = [](bool graphs, std::vector<int64_t>& launches) {
    std::vector<double> losses;
    testing::with_engines(
        {.overrides = narrow({kSeparate}), .graphs = graphs}, [&](int, Engine& engine) {
          const test::BackwardOnThisThread here;
          const auto objective = make_next_token_objective();
          for (const int64_t length : kLengths) {
            const int64_t before = test::graph_launches();
            const auto step = static_cast<int64_t>(losses.size());
            losses.push_back(engine.step(batches_of(engine.plan(), step, length), *objective).loss);
            launches.push_back(test::graph_launches() - before);
          }
        });
    return losses;
  };
  std::vector<int64_t> plain_launches, launches;
  const auto plain = run(false, plain_launches), graph = run(true, launches);
  EXPECT_EQ(graph, plain);
  EXPECT_THAT(launches, ElementsAre(0, 0, 2, 0, 2, 2, 2, 0, 2, 2));
}

struct Line {
  log::Level level;
  std::string text;
};
std::vector<Line> warnings_of(const TinyRun& run) {
  std::vector<Line> lines;
  log::set_observer(
      [](void* list, log::Level level, std::string_view, std::string_view text) {
        static_cast<std::vector<Line>*>(list)->push_back({level, std::string(text)});
      },
      &lines);
  log_attention(testing::make_tiny_plan(run), device::run_device());
  log::set_observer(nullptr, nullptr);
  return lines;
}

TEST(DeviceAttention, TheReferenceInBf16IsAWarning) {
  EXPECT_THAT(warnings_of({.overrides = narrow()}), IsEmpty());
  EXPECT_THAT(warnings_of({.overrides = narrow({kSeparate})}), IsEmpty());
  EXPECT_THAT(warnings_of({.overrides = {kSeparate}}), IsEmpty());  // fp64: as asked for
  const auto odd = warnings_of({.overrides = narrow({"model.head_dim=20"})});
  ASSERT_EQ(odd.size(), 1U);
  EXPECT_THAT(odd[0].text, HasSubstr("heads of 20"));
  EXPECT_THAT(odd[0].text, HasSubstr("Set model.head_dim"));
  TinyRun ring{.ranks = 2, .overrides = narrow({kSeparate, "parallel.context.size=2"})};
  EXPECT_THAT(warnings_of(ring), IsEmpty());
  ring.overrides.front() = "precision.compute=fp32";
  const auto in_fp32 =
      ops::choose_attention(attention_case(testing::make_tiny_plan(ring), device::run_device()));
  EXPECT_EQ(in_fp32.form, ops::AttentionForm::kReference);
  EXPECT_THAT(in_fp32.fix, HasSubstr("parallel.context.method: all_to_all"));
}

TEST(DeviceAttention, AWindowInARingIsAWarning_WhereItCutsAPart) {
  const auto warnings = [](const char* window, const char* documents = "data.documents=joined") {
    return warnings_of({.ranks = 2,
                        .overrides = narrow({"parallel.context.size=2", documents,
                                             std::string("model.sliding_window=") + window})});
  };
  ASSERT_EQ(warnings("5").size(), 1U);  // chunks of 3 tokens
  EXPECT_THAT(warnings("5")[0].text, HasSubstr("parallel.context.method: all_to_all"));
  EXPECT_THAT(warnings("12"), IsEmpty());
  const auto separate = warnings("5", "data.documents=separate");
  ASSERT_EQ(separate.size(), 1U);
  EXPECT_THAT(separate[0].text, HasSubstr("documents are separate"));
  EXPECT_THAT(warnings("12", "data.documents=separate"), IsEmpty());
}

TEST(DeviceAttention, StartsAreFoundWhereTheyAreRead) {
  const at::Device device = device::run_device();
  const auto uses = [&](const TinyRun& run) {
    return uses_document_starts(testing::make_tiny_plan(run), device);
  };
  EXPECT_TRUE(uses({.overrides = narrow()}));
  EXPECT_TRUE(uses({.overrides = {"precision.compute=fp32", "model.head_dim=16"}}));
  EXPECT_FALSE(uses({.overrides = {kSeparate}}));
  EXPECT_TRUE(uses({.ranks = 2, .overrides = narrow({"parallel.context.size=2"})}));
  EXPECT_FALSE(uses_document_starts(testing::make_tiny_plan({.overrides = narrow()}), at::kCPU));
}

}  // namespace
}  // namespace capstan::engine
