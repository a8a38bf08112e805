// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Linear layers in fp8 on the fake device against their emulation on the CPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>

#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/ops/fp8.h"
#include "capstan/ops/gemm.h"
#include "ranks/engine_fixture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"
#include "support/fake_device/fake_lt.h"
#include "support/run_ranks.h"

namespace capstan::engine {
namespace {

using testing::make_batches;
using testing::TinyResult;
using testing::TinyRun;
using testing::train;

constexpr const char* kScalings[] = {"tensor", "row", "delayed"};
TinyRun fp8_run(const std::string& scaling) {
  return {.overrides = {"precision.compute=bf16", "model.hidden_size=32",
                        "model.intermediate_size=48", "model.head_dim=16",
                        "batch.sequence_length=16", "precision.fp8.scaling=" + scaling}};
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

// What the CPU gives, before there is a device: a process has one.
class OnTheCpu : public ::testing::Environment {
 public:
  static std::map<std::string, TinyResult>& fp8() {
    static std::map<std::string, TinyResult> of_scaling;
    return of_scaling;
  }
  void SetUp() override {
    for (const char* scaling : kScalings) fp8()[scaling] = train(fp8_run(scaling));
    test::install_fake_device();
  }
};
const auto* const on_the_cpu = ::testing::AddGlobalTestEnvironment(new OnTheCpu);

// Linear layers in fp8 by our kernels and _scaled_mm, and by the casts of ATen. LibTorch's weight
// gradients are rounded to bf16 on the way to the buffer, those of the CPU are not.
TEST(Device, Fp8_StaysCloseToTheCpu) {
  for (const char* scaling : kScalings)
    for (const bool by_kernels : {true, false}) {
      if (by_kernels) ops::install_device_kernels(&test::fake_kernels());
      const TinyResult got = train(fp8_run(scaling), on_own_thread());
      ops::install_device_kernels(nullptr);
      const TinyResult& expected = OnTheCpu::fp8().at(scaling);
      for (size_t i = 0; i < got.reports.size(); ++i) {
        EXPECT_NEAR(got.reports[i].loss / expected.reports[i].loss, 1, 2e-2) << scaling;
        EXPECT_NEAR(got.reports[i].grad_norm / expected.reports[i].grad_norm, 1, 0.1) << scaling;
      }
    }
}

// With cuBLASLt weight gradients reach the fp32 buffer without a rounding to bf16, as in the
// emulation: what stays apart is other ops' rounding.
TEST(Device, Fp8_ByCublaslt_SumsWeightGradientsInFp32) {
  ops::install_device_kernels(&test::fake_kernels());
  for (const char* scaling : kScalings)
    for (const char* gemm : {"auto", "cublaslt"}) {
      const auto api = std::make_shared<test::FakeLt>();
      ops::install_lt_api(api);
      TinyRun run = fp8_run(scaling);
      run.gemm = gemm;
      const TinyResult got = train(run, on_own_thread());
      EXPECT_GT(api->products(), 0);
      const TinyResult& expected = OnTheCpu::fp8().at(scaling);
      for (size_t i = 0; i < got.reports.size(); ++i) {
        EXPECT_NEAR(got.reports[i].loss / expected.reports[i].loss, 1, 1e-2) << scaling;
        EXPECT_NEAR(got.reports[i].grad_norm / expected.reports[i].grad_norm, 1, 0.1) << scaling;
      }
    }
  ops::install_lt_api(nullptr);
  ops::install_device_kernels(nullptr);
}

// Biases are added in products of fp8; GELU, its derivative and bias gradients are done apart.
TEST(Device, Fp8_OfGpt2_HasBiasesInItsProducts) {
  for (const char* scaling : kScalings) {
    TinyRun run = fp8_run(scaling);
    for (const char* more : {"model.family=gpt2", "model.num_key_value_heads=4", "model.head_dim=8",
                             "model.intermediate_size=64"})
      run.overrides.emplace_back(more);
    run.gemm = "libtorch";
    const TinyResult expected = train(run, on_own_thread());
    const auto api = std::make_shared<test::FakeLt>();
    ops::install_lt_api(api);
    run.gemm = "cublaslt";
    const TinyResult got = train(run, on_own_thread());
    ops::install_lt_api(nullptr);
    EXPECT_GT(api->products(ops::LtEpilogue::kBias), 0);
    for (const auto apart : {ops::LtEpilogue::kGeluBias, ops::LtEpilogue::kGeluGradient,
                             ops::LtEpilogue::kBiasGradient})
      EXPECT_EQ(api->products(apart), 0);
    for (size_t i = 0; i < got.reports.size(); ++i)
      EXPECT_NEAR(got.reports[i].loss / expected.reports[i].loss, 1, 1e-2) << scaling;
  }
}

// The emulation on the CPU and the kernels give the same bits; so does the transposed cast.
TEST(Device, Fp8Casts_AreTheEmulations) {
  ops::install_device_kernels(&test::fake_kernels());
  at::manual_seed(3);
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const auto format : {ops::Fp8Format::kE4m3, ops::Fp8Format::kE5m2}) {
      Tensor x = (at::randn({48, 80}) * at::exp(at::randn({48, 1}) * 4)).to(type);
      x[5].zero_();
      x[7][3] = std::nanf("");
      const Tensor there = x.to(device::run_device());
      const Tensor top = ops::largest_size(x), top_there = ops::largest_size(there);
      EXPECT_TRUE(at::equal(top_there.cpu(), top));
      const auto same = [](const ops::Fp8Matrix& a, const ops::Fp8Matrix& b) {
        return at::equal(a.values_MK.view(at::kByte).cpu(), b.values_MK.view(at::kByte)) &&
               at::equal(a.inverse_scale.cpu(), b.inverse_scale);
      };
      for (const bool transposed : {false, true})
        EXPECT_TRUE(same(ops::quantise(there, format, top_there, {.transposed = transposed}),
                         ops::quantise(x, format, top, {.transposed = transposed})));
      EXPECT_TRUE(same(ops::quantise_rows(there, format), ops::quantise_rows(x, format)));
    }
  ops::install_device_kernels(nullptr);
}

TEST(Device, Fp8_LeavesTheHostAlone) {
  ops::install_device_kernels(&test::fake_kernels());
  for (const char* scaling : kScalings)
    testing::with_engines(
        fp8_run(scaling),
        [&](int rank, Engine& engine) {
          const auto objective = make_next_token_objective();
          (void)engine.step(make_batches(engine.plan(), rank, 0), *objective);
          const int64_t before = test::host_syncs();
          (void)engine.step(make_batches(engine.plan(), rank, 1), *objective);
          const int64_t waits = test::host_syncs() - before;
          EXPECT_TRUE(engine.reports_late());
          EXPECT_EQ(waits, 0) << scaling << ": " << test::last_host_syncs(waits);
        },
        on_own_thread());
  ops::install_device_kernels(nullptr);
}

// Casts of weights are part of the launches, also where an evaluation between two steps made its
// own, and where weights are frozen.
TEST(Device, Fp8_LaunchedAsGraphsIsTheSame) {
  const auto losses = [](TinyRun run, bool graphs) {
    run.graphs = graphs;
    std::vector<double> made;
    testing::with_engines(run, [&](int rank, Engine& engine) {
      const test::BackwardOnThisThread here;
      const auto objective = make_next_token_objective();
      for (int step = 0; step < 6; ++step) {
        made.push_back(engine.step(make_batches(engine.plan(), rank, step), *objective).loss);
        engine.evaluate(make_batches(engine.plan(), rank, 100)[0]);
        made.push_back(engine.report_eval().loss());
        if (step != 3) continue;
        for (const auto& entry : engine.state_entries()) {
          if (entry.kind == "model") entry.tensor.mul_(0.5);
          if (entry.kind == "fp8") entry.tensor.zero_();  // no history any more
        }
        engine.restore(engine.scalars());
      }
    });
    return made;
  };
  ops::install_device_kernels(&test::fake_kernels());
  const std::vector<std::vector<std::string>> more = {
      {},
      {"model.frozen=['*', '!*.1.*']"},
      {"optimizer.in_backward=true", "optimizer.max_grad_norm=none", "batch.micro_samples=8"}};
  for (const char* scaling : kScalings)
    for (const auto& overrides : more) {
      TinyRun run = fp8_run(scaling);
      run.overrides.insert(run.overrides.end(), overrides.begin(), overrides.end());
      EXPECT_EQ(losses(run, true), losses(run, false)) << scaling << overrides.size();
    }
  ops::install_device_kernels(nullptr);
}

// Delayed scaling where the gradients of some first steps are not finite: each step by step.
struct Delayed {
  std::vector<double> losses;
  Tensor history;
  int64_t waits = 0, launches = 0;  // behind the second step
};
Delayed train_delayed(int spoilt_steps, bool ahead, bool graphs) {
  testing::TinyHooks hooks;
  hooks.hooks = [=](int) {
    thread_local const test::BackwardOnThisThread here;
    EngineHooks made;
    made.before_reduce = [=, step = -1](int bucket, const Tensor& gradients) mutable {
      if (bucket == 0) ++step;
      if (bucket == 1 && step < spoilt_steps) gradients.fill_(std::nan(""));
    };
    return made;
  };
  TinyRun run = fp8_run("delayed");
  run.overrides.insert(run.overrides.end(),
                       {"precision.fp8.history=3", "optimizer.nonfinite_limit=9"});
  run.graphs = graphs;
  Delayed out;
  testing::with_engines(
      run,
      [&](int rank, Engine& engine) {
        const auto objective = make_next_token_objective();
        for (int step = 0; step < 8; ++step) {
          if (step == 2) out.waits = -test::host_syncs(), out.launches = -test::graph_launches();
          engine.start_step(make_batches(engine.plan(), rank, step), *objective);
          if (!ahead || engine.unreported_steps() > 1)
            out.losses.push_back(engine.finish_step().loss);
        }
        out.waits += test::host_syncs();
        out.launches += test::graph_launches();
        while (engine.unreported_steps() > 0) out.losses.push_back(engine.finish_step().loss);
        for (const auto& entry : engine.state_entries())
          if (entry.kind == "fp8") out.history = entry.tensor.cpu().clone();
      },
      hooks);
  return out;
}

// Whether there is a history yet is the device's to know; a graph that was recorded before the
// host has heard of one is recorded again.
TEST(Device, Fp8_HistoriesDoNotWaitForTheHost) {
  for (const bool by_kernels : {true, false})
    for (const int spoilt_steps : {0, 1, 2}) {
      if (by_kernels) ops::install_device_kernels(&test::fake_kernels());
      const Delayed at_once = train_delayed(spoilt_steps, false, false);
      const Delayed ahead = train_delayed(spoilt_steps, true, false);
      const Delayed graph = train_delayed(spoilt_steps, true, true);
      ops::install_device_kernels(nullptr);
      EXPECT_GT(at_once.history.max().item<float>(), 0);
      for (const Delayed* got : {&ahead, &graph}) {
        EXPECT_EQ(got->losses, at_once.losses);
        EXPECT_TRUE(got->history.equal(at_once.history));
      }
      EXPECT_EQ(ahead.waits, 0) << test::last_host_syncs(ahead.waits);
      const bool again = spoilt_steps > 0;  // a wait for each graph, and a step as it is
      EXPECT_EQ(graph.waits, again ? 2 : 0) << spoilt_steps;
      EXPECT_EQ(graph.launches, 2 * (again ? 5 : 6)) << spoilt_steps;
    }
}

}  // namespace
}  // namespace capstan::engine
