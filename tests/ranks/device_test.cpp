// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A run on a device is the run on the CPU: the same engine on the fake device, whose memory the
// host cannot touch, whose streams notice a missing wait and which counts how often the host waits.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <map>

#include "capstan/base/error.h"
#include "capstan/checkpoint/saver.h"
#include "capstan/infer/kv_cache.h"
#include "capstan/ops/device_kernels.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"
#include "support/run_ranks.h"

namespace capstan::engine {
namespace {

using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;
using testing::train;

struct Case {
  const char* name;
  std::vector<std::string> overrides;
};
std::vector<Case> cases() {
  const std::string moe = "model.family=moe";
  const std::vector<std::string> experts{moe, "model.experts.count=4", "model.experts.per_token=2",
                                         "model.experts.auxiliary_loss=0.02"};
  const auto with = [&](std::vector<std::string> list) {
    list.insert(list.begin(), experts.begin(), experts.end());
    return list;
  };
  return {
      {"plain", {}},
      {"tied", {"model.tie_word_embeddings=true"}},
      {"untied, biases", {"model.tie_word_embeddings=false", "model.attention_bias=true"}},
      {"window and documents", {"model.sliding_window=5", "data.documents=separate"}},
      {"recompute", {"parallel.recompute.mode=block"}},
      {"selective",
       {"parallel.recompute.mode=selective", "parallel.recompute.parts=[attention, mlp, norm]"}},
      {"activations on the host", {"parallel.offload_activations=true"}},
      {"optimizer on the host", {"parallel.zero.stage=1", "parallel.zero.offload=optimizer"}},
      {"all on the host", {"parallel.zero.stage=3", "parallel.zero.offload=all"}},
      {"frozen", {"model.frozen=['*', '!*.1.*']"}},
      {"kept", {"precision.keep_fp32=['*norm*']"}},
      {"experts", experts},
      {"experts by sigmoid",
       with({"model.experts.router=sigmoid", "model.experts.z_loss=0.001",
             "model.experts.bias_update_rate=0.01", "model.experts.auxiliary_scope=global"})},
      {"experts of a capacity", with({"model.experts.capacity_factor=1.0"})},
  };
}

// LibTorch starts a thread per device for its backward at the first one of the process, which was
// on the CPU: ranks do theirs on their own thread.
testing::TinyHooks on_own_thread() {
  return {.hooks =
              [](int) {
                thread_local const test::BackwardOnThisThread here;
                return EngineHooks{};
              },
          .objective = {}};
}

struct Evaluated {
  TinyResult run;
  double loss = 0;
  Tensor logits, cached_logits;
};

Evaluated evaluate(const TinyRun& run) {
  Evaluated out{.run = train(run, on_own_thread())};
  testing::with_engines(
      run,
      [&](int rank, Engine& engine) {
        for (const MicroBatch& batch : make_batches(engine.plan(), rank, 3)) engine.evaluate(batch);
        out.loss = engine.report_eval().loss();
        const auto& shape = engine.plan().model().shape;
        const Tensor ids = at::arange(9, at::kLong).unsqueeze(0);
        out.logits = engine.next_logits(ids, nullptr).cpu();
        infer::ContiguousKvCache cache(static_cast<int>(shape.num_hidden_layers), 12);
        (void)engine.next_logits(ids.narrow(1, 0, 8), &cache);
        out.cached_logits = engine.next_logits(ids.narrow(1, 8, 1), &cache).cpu();
      },
      on_own_thread());
  return out;
}

// What the CPU gives, before there is a device: a process has one.
class OnTheCpu : public ::testing::Environment {
 public:
  static std::map<std::string, Evaluated>& results() {
    static std::map<std::string, Evaluated> of_case;
    return of_case;
  }
  static TinyResult& narrow() {
    static TinyResult result;
    return result;
  }
  void SetUp() override {
    for (const Case& c : cases()) results()[c.name] = evaluate({.overrides = c.overrides});
    narrow() = train({.overrides = {"precision.compute=bf16"}});
    test::install_fake_device();
  }
};
const auto* const on_the_cpu = ::testing::AddGlobalTestEnvironment(new OnTheCpu);

class OnADevice : public ::testing::TestWithParam<Case> {};

TEST_P(OnADevice, TheRunIsThatOfTheCpu) {
  const Evaluated& expected = OnTheCpu::results().at(GetParam().name);
  const Evaluated got = evaluate({.overrides = GetParam().overrides});
  testing::expect_same_run(got.run, expected.run, 1e-10);
  EXPECT_NEAR(got.loss, expected.loss, 1e-10);
  EXPECT_LE((got.logits - expected.logits).abs().max().item<double>(), 1e-10);
  EXPECT_LE((got.cached_logits - expected.cached_logits).abs().max().item<double>(), 1e-10);
}

// Our kernels, run by the emulator, in the place of ATen's.
TEST_P(OnADevice, TheRunByOurKernelsToo) {
  ops::install_device_kernels(&test::fake_kernels());
  const Evaluated& expected = OnTheCpu::results().at(GetParam().name);
  const Evaluated got = evaluate({.overrides = GetParam().overrides});
  ops::install_device_kernels(nullptr);
  testing::expect_same_run(got.run, expected.run, 1e-10);
  EXPECT_NEAR(got.loss, expected.loss, 1e-10);
  EXPECT_LE((got.logits - expected.logits).abs().max().item<double>(), 1e-10);
  EXPECT_LE((got.cached_logits - expected.cached_logits).abs().max().item<double>(), 1e-10);
}

INSTANTIATE_TEST_SUITE_P(Runs, OnADevice, ::testing::ValuesIn(cases()), [](const auto& one) {
  std::string name = one.param.name;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
});

TEST(Device, Bf16_StaysCloseToTheCpu) {
  const TinyResult got = train({.overrides = {"precision.compute=bf16"}}, on_own_thread());
  for (size_t i = 0; i < got.reports.size(); ++i) {
    EXPECT_NEAR(got.reports[i].loss / OnTheCpu::narrow().reports[i].loss, 1, 5e-3);
    EXPECT_NEAR(got.reports[i].grad_norm / OnTheCpu::narrow().reports[i].grad_norm, 1, 3e-2);
  }
}

// The loss and the gradient norm; nothing inside the micro-batches.
TEST(Device, TheHostWaitsTwiceInAStep) {
  testing::with_engines(
      {},
      [](int rank, Engine& engine) {
        const auto objective = make_next_token_objective();
        (void)engine.step(make_batches(engine.plan(), rank, 0), *objective);
        const int64_t before = test::host_syncs();
        (void)engine.step(make_batches(engine.plan(), rank, 1), *objective);
        const int64_t waits = test::host_syncs() - before;
        EXPECT_LE(waits, 2) << test::last_host_syncs(waits);
      },
      on_own_thread());
}

TEST(Device, Ids_AreCheckedBeforeTheyAreThere) {
  testing::with_engines(
      {},
      [](int rank, Engine& engine) {
        auto batches = make_batches(engine.plan(), rank, 0);
        batches[0].ids_BT[0][2] = 4711;
        const auto objective = make_next_token_objective();
        EXPECT_THROW((void)engine.step(batches, *objective), DataError);
      },
      on_own_thread());
}

// A checkpoint of a device goes through the host and comes back.
TEST(Device, State_TravelsThroughTheHost) {
  testing::with_engines(
      {},
      [](int rank, Engine& engine) {
        const auto objective = make_next_token_objective();
        (void)engine.step(make_batches(engine.plan(), rank, 0), *objective);
        const std::string hash = engine.weights_hash();
        const checkpoint::HostState state(engine.state_entries());
        std::vector<std::vector<std::byte>> saved;
        for (const auto& blob : state.blobs())
          saved.emplace_back(blob.bytes.begin(), blob.bytes.end());
        (void)engine.step(make_batches(engine.plan(), rank, 1), *objective);
        EXPECT_NE(engine.weights_hash(), hash);
        const auto blobs = state.blobs();
        for (size_t i = 0; i < saved.size(); ++i)
          EXPECT_TRUE(std::equal(saved[i].begin(), saved[i].end(), blobs[i].bytes.begin()));
        state.write_back();
        engine.restore(engine.scalars());
        EXPECT_EQ(engine.weights_hash(), hash);
      },
      on_own_thread());
}

}  // namespace
}  // namespace capstan::engine
