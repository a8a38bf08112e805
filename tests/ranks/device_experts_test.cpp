// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Experts on the fake device by our kernels: one product for all of a layer, for which the host
// waits nowhere in a step, with the states of routers kept on the device; in graphs too.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>

#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "engine/experts_note_internal.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"

namespace capstan::engine {
namespace {

using ::testing::HasSubstr;
using testing::make_batches;
using testing::TinyHooks;
using testing::TinyResult;
using testing::TinyRun;

constexpr int kSteps = 5;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

using Overrides = std::vector<std::string>;
Overrides experts(const Overrides& more = {}) {
  Overrides all{"model.family=moe", "model.experts.count=4", "model.experts.per_token=2",
                "model.experts.auxiliary_loss=0.02"};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}
Overrides balanced(const Overrides& more = {}) {
  Overrides all = experts({"model.experts.router=sigmoid", "model.experts.bias_update_rate=0.01",
                           "model.experts.auxiliary_scope=global", "model.experts.z_loss=0.001"});
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

std::map<std::string, Overrides> cases() {
  return {{"plain", experts()},
          {"balanced", balanced()},
          {"capacity", balanced({"model.experts.capacity_factor=0.75"})},
          {"large capacity", balanced({"model.experts.capacity_factor=1.2"})},
          {"shared", experts({"model.experts.shared_intermediate_size=16"})},
          {"recompute", balanced({"parallel.recompute.mode=block"})},
          {"selective", experts({"parallel.recompute.mode=selective",
                                 "parallel.recompute.parts=[attention, mlp, norm]"})},
          {"frozen", experts({"model.frozen=['*.layers.0.mlp.experts.*']"})}};
}

// Gradients of one step are multiplied by NaN.
TinyHooks hooks_of(int spoilt_step) {
  return {.hooks =
              [=](int) {
                thread_local const test::BackwardOnThisThread here;
                EngineHooks made;
                made.before_reduce = [=, step = -1](int bucket, const Tensor& g) mutable {
                  if (bucket == 0) ++step;
                  if (bucket == 1 && step == spoilt_step) g.mul_(kNan);
                };
                return made;
              },
          .objective = {}};
}

struct Trained {
  TinyResult run;
  std::map<std::string, Tensor> routers;          // biases and fractions
  int64_t waits = 0, launches = 0, products = 0;  // of the last two steps
};

// Each step is queued before the report of the one before it.
Trained train_ahead(const TinyRun& run, int spoilt_step = -1) {
  Trained out;
  testing::with_engines(
      run,
      [&](int rank, Engine& engine) {
        const auto objective = make_next_token_objective();
        for (int step = 0; step < kSteps; ++step) {
          if (step == kSteps - 2)
            out.waits = -test::host_syncs(), out.launches = -test::graph_launches(),
            out.products = -test::grouped_products();
          engine.start_step(make_batches(engine.plan(), rank, step), *objective);
          if (engine.unreported_steps() > 1) out.run.reports.push_back(engine.finish_step());
        }
        out.waits += test::host_syncs();
        out.launches += test::graph_launches();
        out.products += test::grouped_products();
        while (engine.unreported_steps() > 0) out.run.reports.push_back(engine.finish_step());
        out.run.weights = testing::copy_weights(engine);
        out.run.hash = engine.weights_hash();
        for (const auto& entry : engine.state_entries())
          if (entry.kind == "router") out.routers[entry.name] = entry.tensor.cpu().clone();
      },
      hooks_of(spoilt_step));
  return out;
}

class OnTheCpu : public ::testing::Environment {
 public:
  static std::map<std::string, Trained>& runs() {
    static std::map<std::string, Trained> of_case;
    return of_case;
  }
  void SetUp() override {
    for (const auto& [name, overrides] : cases())
      runs()[name] = train_ahead({.overrides = overrides}, 2);
    runs()["capacity, applied"] = train_ahead({.overrides = cases().at("capacity")});
    test::install_fake_device();
    ops::install_device_kernels(&test::fake_kernels());
  }
};
const auto* const on_the_cpu = ::testing::AddGlobalTestEnvironment(new OnTheCpu);

void expect_same_loads(const StepReport& got, const StepReport& want) {
  ASSERT_EQ(got.experts.size(), want.experts.size());
  for (size_t layer = 0; layer < got.experts.size(); ++layer) {
    const auto &a = got.experts[layer], &b = want.experts[layer];
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.dropped, b.dropped);
    EXPECT_EQ(a.routed_tokens, b.routed_tokens);
    EXPECT_NEAR(a.auxiliary_loss, b.auxiliary_loss, 1e-12);
    EXPECT_NEAR(a.z_loss, b.z_loss, 1e-12);
  }
}

// The third step is skipped: its loads are reported and change no state.
TEST(DeviceExperts, RunsThatNeverWaitAreThoseOfTheCpu) {
  for (const auto& [name, overrides] : cases()) {
    SCOPED_TRACE(name);
    const Trained& want = OnTheCpu::runs().at(name);
    const Trained got = train_ahead({.overrides = overrides}, 2);
    EXPECT_EQ(got.waits, 0) << test::last_host_syncs(got.waits);
    EXPECT_GT(got.products, 0);
    testing::expect_same_run(got.run, want.run, 1e-10);
    EXPECT_NE(got.run.reports.at(2).skipped, "");
    for (size_t i = 0; i < kSteps; ++i) expect_same_loads(got.run.reports[i], want.run.reports[i]);
    ASSERT_EQ(got.routers.size(), want.routers.size());
    for (const auto& [entry, state] : want.routers)
      EXPECT_LE((got.routers.at(entry) - state).abs().max().item<double>(), 1e-12) << entry;
  }
}

// Of each layer and micro-batch: forward and input gradient of two matrices, and the gradients of
// both where nobody but the device knows the rows of an expert.
TEST(DeviceExperts, RoomForAllRowsSparesTheProductOfAllGradients) {
  const int64_t per_layer = [] {
    const Trained got = train_ahead({.overrides = cases().at("plain")});
    return got.products / 6;
  }();
  EXPECT_GT(per_layer, 0);
  const int64_t before = test::batched_products();
  EXPECT_EQ(train_ahead({.overrides = cases().at("capacity")}).products, 4 * per_layer);
  EXPECT_GT(test::batched_products(), before);
  EXPECT_EQ(train_ahead({.overrides = cases().at("large capacity")}).products, 6 * per_layer);
}

// Where a rule needs the host first, it closes the step of experts too.
TEST(DeviceExperts, TheHostMayDecide) {
  const Trained& want = OnTheCpu::runs().at("balanced");
  const Trained got = train_ahead(
      {.overrides = balanced({"parallel.zero.stage=1", "parallel.zero.offload=optimizer"})}, 2);
  testing::expect_same_run(got.run, want.run, 1e-10);
  for (size_t i = 0; i < kSteps; ++i) expect_same_loads(got.run.reports[i], want.run.reports[i]);
  for (const auto& [entry, state] : want.routers)
    EXPECT_LE((got.routers.at(entry) - state).abs().max().item<double>(), 1e-12) << entry;
}

TEST(DeviceExperts, ChoicesAreDroppedInTheCaseOfACapacity) {
  double dropped = 0;
  for (const auto& report : OnTheCpu::runs().at("capacity").run.reports)
    for (const auto& load : report.experts) dropped += load.dropped;
  EXPECT_GT(dropped, 0);
}

// In a type without grouped products: for the rows of each layer and pass, and for nothing else.
TEST(DeviceExperts, ALoopWaitsOncePerLayerAndPass) {
  for (const auto& [passes, more] :
       std::map<int, Overrides>{{4, {"precision.compute=fp32"}},
                                {8, {"precision.compute=fp32", "parallel.recompute.mode=block"}}}) {
    const Trained got = train_ahead({.overrides = balanced(more)});
    EXPECT_EQ(got.waits, 2 * 2 * passes) << test::last_host_syncs(got.waits);
    EXPECT_EQ(got.products, 0);
  }
}

TEST(DeviceExperts, LaunchedStepsAreThoseWithoutGraphs) {
  for (const auto& [name, overrides] : cases()) {
    SCOPED_TRACE(name);
    Overrides narrow = overrides;
    narrow.emplace_back("precision.compute=bf16");
    const Trained plain = train_ahead({.overrides = narrow}, name == "balanced" ? 1 : -1);
    const Trained graph =
        train_ahead({.overrides = narrow, .graphs = true}, name == "balanced" ? 1 : -1);
    testing::expect_same_run(graph.run, plain.run, 0);
    EXPECT_EQ(graph.run.hash, plain.run.hash);
    EXPECT_EQ(graph.launches, 2 * 2);
    EXPECT_EQ(graph.waits, 0) << test::last_host_syncs(graph.waits);
    EXPECT_EQ(plain.waits, 0) << test::last_host_syncs(plain.waits);
    EXPECT_NEAR(plain.run.reports[0].loss / OnTheCpu::runs().at(name).run.reports[0].loss, 1, 1e-2);
    for (size_t i = 0; i < kSteps; ++i)
      expect_same_loads(graph.run.reports[i], plain.run.reports[i]);
    for (const auto& [entry, state] : plain.routers)
      EXPECT_TRUE(graph.routers.at(entry).equal(state)) << entry;
  }
}

struct Spread {
  int ranks;
  Overrides layout;
};
std::vector<Spread> spreads() {
  const std::string shards = "parallel.zero.stage=1";
  return {{2, {"parallel.expert=2", shards}},
          {2, {"parallel.expert=2", "parallel.tensor=2"}},
          {2, {"parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"}},
          {4,
           {"parallel.expert=4", "parallel.context.size=2", "parallel.context.method=all_to_all",
            shards}}};
}

// Rows that a capacity bounds travel between ranks in exchanges of one size.
TEST(DeviceExperts, RowsOfACapacityTravelWithoutTheHost) {
  const Trained& want = OnTheCpu::runs().at("capacity, applied");
  for (const Spread& spread : spreads()) {
    SCOPED_TRACE(spread.layout.back());
    TinyRun run{.ranks = spread.ranks, .overrides = cases().at("capacity")};
    run.overrides.insert(run.overrides.end(), spread.layout.begin(), spread.layout.end());
    const plan::Plan plan = testing::make_tiny_plan(run);
    test::run_device_ranks(spread.ranks, [&](comm::Communicator world) {
      const test::BackwardOnThisThread here;
      mesh::Mesh mesh(world, plan.grid);
      Engine engine(plan, mesh);
      int64_t waits = 0;
      for (int step = 0; step < kSteps; ++step) {
        if (step == 1) waits = -test::host_syncs_of_thread();
        const auto batches =
            make_batches(plan, mesh.grid().data_parallel_index(world.rank()), step);
        engine.start_step(batches, *make_next_token_objective());
        if (step == kSteps - 1) waits += test::host_syncs_of_thread();
        const StepReport got = engine.finish_step();
        const StepReport& expected = want.run.reports.at(static_cast<size_t>(step));
        EXPECT_NEAR(got.loss, expected.loss, 1e-9);
        EXPECT_NEAR(got.grad_norm, expected.grad_norm, 1e-9);
        expect_same_loads(got, expected);
      }
      EXPECT_EQ(waits, 0) << test::last_host_syncs(waits);
    });
  }
}

TEST(DeviceExperts, AGraphOfALoopIsRefused) {
  try {
    testing::with_engines({.overrides = experts({"precision.compute=fp32"}), .graphs = true},
                          [](int, Engine&) {});
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("not in fp32"));
  }
}

// Empty unless it is a warning.
std::string warning_of(const Overrides& overrides) {
  std::string line;
  log::set_observer([](void* into, log::Level, std::string_view,
                       std::string_view text) { *static_cast<std::string*>(into) = text; },
                    &line);
  log_experts(testing::make_tiny_plan({.overrides = overrides}), device::run_device());
  log::set_observer(nullptr, nullptr);
  return line;
}

std::string gradients_of(Overrides overrides) {
  overrides.emplace_back("precision.compute=bf16");
  const plan::Plan plan = testing::make_tiny_plan({.overrides = overrides});
  return gradients_text(ops::choose_grouped(experts_case(plan, device::run_device())));
}

TEST(DeviceExperts, TheLogSaysWhetherGradientsAreRounded) {
  EXPECT_THAT(gradients_of(experts()), HasSubstr("only the device knows the rows"));
  EXPECT_THAT(gradients_of(cases().at("large capacity")),
              HasSubstr("only the device knows the rows"));
  for (const Overrides& known :
       {cases().at("capacity"), experts({"model.experts.intermediate_size=20"})})
    EXPECT_THAT(gradients_of(known), HasSubstr("summed in fp32"));
}

TEST(DeviceExperts, ALoopInBf16IsAWarning) {
  EXPECT_EQ(warning_of(experts({"precision.compute=bf16"})), "");
  EXPECT_EQ(warning_of(experts({"precision.compute=fp32"})), "");  // as asked for
  const Overrides odd{"precision.compute=bf16", "model.experts.intermediate_size=20"};
  EXPECT_THAT(warning_of(experts(odd)), HasSubstr("experts of 20 features"));
  const Overrides wide{"precision.compute=bf16", "precision.keep_fp32=['*.experts.*']"};
  EXPECT_THAT(warning_of(experts(wide)), HasSubstr("precision.keep_fp32"));
}

}  // namespace
}  // namespace capstan::engine
