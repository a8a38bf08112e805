// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which algorithm a product takes, with a fake cuBLASLt that tells the times.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "capstan/base/error.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/gemm.h"
#include "capstan/ops/path.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_lt.h"

namespace capstan::ops {
namespace {

using test::FakeLt;
using test::FakeLtOptions;

Tensor on_device(const Tensor& x) { return x.to(device::run_device()); }

Product some_product(int64_t depth = 8) {
  const auto type = at::kBFloat16;
  return {.out_MN = on_device(at::zeros({16, 16}, type)),
          .a_MK = on_device(at::ones({16, depth}, type)),
          .b_KN = on_device(at::ones({depth, 16}, type))};
}
LtProblem problem_of(const Product& p) { return lt_problem_of(p).value(); }

// A time for each algorithm.
FakeLtOptions with_times(std::vector<double> us, double libtorch_us) {
  return {.us = [us](const LtProblem&, int i) { return us.at(static_cast<size_t>(i)); },
          .libtorch_us = libtorch_us};
}

TEST(GemmChoice, TheFastestIsTaken) {
  const auto api = std::make_shared<FakeLt>(with_times({5, 3, 4}, 2));
  Gemm gemm(api, GemmLibrary::kCublaslt);
  const Product p = some_product();
  const GemmChoice choice = gemm.measure(problem_of(p));
  EXPECT_DOUBLE_EQ(choice.us, 3);
  EXPECT_EQ(gemm.adopt({choice}), 1);
  EXPECT_TRUE(gemm.multiply(p));
  EXPECT_EQ(api->last_algorithm(), 1);
  EXPECT_EQ(api->products(), 1);
}

TEST(GemmChoice, AutoComparesWithLibTorch) {
  for (const auto& [libtorch_us, is_lt] : {std::pair(2.0, false), {3.5, true}}) {
    const auto api = std::make_shared<FakeLt>(with_times({5, 3, 4}, libtorch_us));
    Gemm gemm(api, GemmLibrary::kAuto);
    const Product p = some_product();
    EXPECT_FALSE(gemm.multiply(p)) << "before it was measured";
    ASSERT_EQ(gemm.unmeasured().size(), 1U);
    const GemmChoice choice = gemm.measure(gemm.unmeasured().front());
    EXPECT_DOUBLE_EQ(choice.rival_us, libtorch_us);
    EXPECT_EQ(gemm.adopt({choice}), 1);
    EXPECT_TRUE(gemm.unmeasured().empty());
    EXPECT_EQ(gemm.multiply(p), is_lt);
  }
}

TEST(GemmChoice, WithoutAMeasurementCublasltTakesItsFirst) {
  const auto api = std::make_shared<FakeLt>();
  Gemm gemm(api, GemmLibrary::kCublaslt);
  const Product p = some_product();
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(gemm.multiply(p));
  EXPECT_EQ(api->last_algorithm(), 0);
  EXPECT_EQ(api->searches(), 1) << "asked once";
  EXPECT_EQ(api->timed(), 0) << "nothing is measured in a product";
  EXPECT_EQ(gemm.unmeasured().size(), 1U);
}

TEST(GemmChoice, WhatTheLibraryHasNotIsLibTorchs) {
  const auto api = std::make_shared<FakeLt>(
      FakeLtOptions{.has_algorithms = [](const LtProblem& p) { return p.depth() != 8; }});
  Gemm gemm(api, GemmLibrary::kCublaslt);
  EXPECT_FALSE(gemm.multiply(some_product(8)));
  EXPECT_TRUE(gemm.multiply(some_product(16)));
  const GemmChoice choice = gemm.measure(problem_of(some_product(8)));
  EXPECT_FALSE(choice.algorithm);
  EXPECT_EQ(gemm.adopt({choice}), 1);
  EXPECT_FALSE(gemm.multiply(some_product(8)));
}

Product some_activated() {
  Product p = some_product();
  p.bias_N = on_device(at::ones({16}, at::kBFloat16));
  p.sum_MN = on_device(at::zeros({16, 16}, at::kBFloat16));
  return p;
}

// A fused product's rival is the faster of cuBLASLt and, in auto, LibTorch for the product alone.
TEST(GemmChoice, AFusedProductIsComparedWithItsParts) {
  struct Case {
    GemmLibrary library;
    double fused_us, alone_us, libtorch_us, rival_us;
  };
  for (const Case& c : {Case{GemmLibrary::kAuto, 5, 7, 6, 6},
                        {GemmLibrary::kAuto, 5, 4, 6, 4},
                        {GemmLibrary::kAuto, 5, 7, 3, 3},
                        {GemmLibrary::kCublaslt, 5, 7, 3, 7},
                        {GemmLibrary::kCublaslt, 5, 4, 3, 4}}) {
    const auto api = std::make_shared<FakeLt>(FakeLtOptions{
        .us = [c](const LtProblem& p, int) { return is_fused(p) ? c.fused_us : c.alone_us; },
        .libtorch_us = c.libtorch_us});
    Gemm gemm(api, c.library);
    const Product p = some_activated();
    EXPECT_EQ(gemm.multiply(p), c.library == GemmLibrary::kCublaslt) << "before it was measured";
    EXPECT_EQ(gemm.unmeasured().size(), 2U) << "the product alone as well";
    const GemmChoice choice = gemm.measure(problem_of(p));
    EXPECT_DOUBLE_EQ(choice.us, c.fused_us);
    EXPECT_DOUBLE_EQ(choice.rival_us, c.rival_us);
    EXPECT_EQ(choice.algorithm.has_value(), c.fused_us < c.rival_us);
    EXPECT_EQ(gemm.adopt({choice}), 1);
    EXPECT_EQ(gemm.multiply(p), c.fused_us < c.rival_us);
    EXPECT_EQ(gemm.unmeasured().size(), 1U);
  }
}

TEST(GemmChoice, AnEpilogueThatTheLibraryHasNotIsDoneInParts) {
  const auto api = std::make_shared<FakeLt>(
      FakeLtOptions{.has_algorithms = [](const LtProblem& p) { return !is_fused(p); }});
  ops::install_lt_api(api);
  const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
  const Product p = some_activated();
  multiply(p);
  EXPECT_EQ(api->products(), 1) << "the product alone";
  EXPECT_TRUE(p.sum_MN.cpu().eq(9).all().item<bool>());
  EXPECT_TRUE(p.out_MN.cpu().eq(9).all().item<bool>());
  const GemmChoice choice = gemm->measure(problem_of(p));
  EXPECT_TRUE(!choice.algorithm && choice.us == 0);
  EXPECT_EQ(gemm->adopt({choice}), 1);
  ops::install_lt_api(std::make_shared<FakeLt>());
}

// A file of another version, or another problem's line.
TEST(GemmChoice, AlgorithmsThatAreNotValidHereAreLeftOut) {
  const auto api = std::make_shared<FakeLt>();
  Gemm gemm(api, GemmLibrary::kCublaslt);
  const Product p = some_product();
  GemmChoice other = gemm.measure(problem_of(some_product(16)));
  other.problem = problem_of(p);
  EXPECT_EQ(gemm.adopt({other}), 0);
  EXPECT_TRUE(gemm.multiply(p));
  EXPECT_EQ(api->last_algorithm(), 0);
}

// run.gemm may change between two processes of a run.
TEST(GemmChoice, ThoseOfTheOtherLibraryAreMeasuredAnew) {
  const auto api = std::make_shared<FakeLt>(with_times({5, 3, 4}, 2));
  Gemm by_auto(api, GemmLibrary::kAuto), by_lt(api, GemmLibrary::kCublaslt);
  const LtProblem problem = problem_of(some_product());
  EXPECT_EQ(by_lt.adopt({by_auto.measure(problem)}), 0) << "LibTorch was faster";
  EXPECT_EQ(by_auto.adopt({by_lt.measure(problem)}), 0) << "LibTorch was not measured";
  EXPECT_EQ(by_auto.adopt({by_auto.measure(problem)}), 1);
  EXPECT_EQ(by_lt.adopt({by_lt.measure(problem)}), 1);
}

TEST(GemmChoice, OfAProcessIsOneWhileSomebodyKeepsIt) {
  const Product p = some_product();
  EXPECT_EQ(Gemm::shared(), nullptr);
  EXPECT_FALSE(multiply_by_lt(p));
  {
    const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
    EXPECT_EQ(Gemm::share(GemmLibrary::kCublaslt), gemm);
    EXPECT_THROW((void)Gemm::share(GemmLibrary::kAuto), InternalError);
    EXPECT_TRUE(multiply_by_lt(p));
    const PathGuard guard(Path::kReference);
    EXPECT_FALSE(multiply_by_lt(p));
  }
  EXPECT_FALSE(multiply_by_lt(p));
}

// The device's graph runs the product again, with the algorithm that it was recorded with.
TEST(GemmChoice, AProductInAGraphIsLaunchedAgain) {
  const auto gemm = Gemm::share(GemmLibrary::kCublaslt);
  device::Accelerator& device = *device::accelerator();
  const device::StreamGuard on(device, device.create_stream(false));
  Product p = some_product();
  p.accumulates = true;
  p.out_MN.zero_();
  const device::Pool pool = device.create_pool();
  device.begin_capture(pool);
  EXPECT_TRUE(gemm->multiply(p));
  EXPECT_THROW((void)gemm->measure(problem_of(p)), c10::Error);
  const device::Graph graph = device.end_capture();
  EXPECT_EQ(p.out_MN.cpu().sum().item<double>(), 0);
  for (int i = 0; i < 2; ++i) device.launch(graph);
  EXPECT_TRUE(p.out_MN.cpu().eq(16).all().item<bool>());
  device.destroy(graph);
  device.destroy(pool);
}

// The fake itself: what it must not let pass.
TEST(FakeLt, RefusesWhatCublasltRefuses) {
  FakeLt api;
  const LtProblem good = problem_of(some_product());
  const auto refuses = [&api](const LtProblem& p) {
    try {
      (void)api.algorithms(p, 1, 1 << 20);
    } catch (const c10::Error&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(refuses(good));
  const auto changed = [&good](const auto& change) {
    LtProblem p = good;
    change(p);
    return p;
  };
  EXPECT_TRUE(refuses(changed([](LtProblem& p) { p.a.leading = p.a.rows - 1; })));
  EXPECT_TRUE(refuses(changed([](LtProblem& p) { p.a_transposed = true; })));
  EXPECT_TRUE(refuses(changed([](LtProblem& p) { p.d.type = LtType::kFp16; })));
  EXPECT_TRUE(refuses(changed([](LtProblem& p) { p.a.type = LtType::kFp32; })));
  EXPECT_TRUE(refuses(changed([](LtProblem& p) { p.scale = LtScale::kTensor; })));
  EXPECT_TRUE(refuses(changed([](LtProblem& p) { p.alignment = 3; })));
  EXPECT_TRUE(
      refuses(changed([](LtProblem& p) { p.accumulates = true, p.epilogue = LtEpilogue::kBias; })));
  const auto with = [&](LtEpilogue epilogue, const auto& change) {
    return changed([&](LtProblem& p) {
      p.epilogue = epilogue;
      change(p);
    });
  };
  for (const LtEpilogue e : {LtEpilogue::kGeluBias, LtEpilogue::kGeluGradient}) {
    EXPECT_FALSE(refuses(with(e, [](LtProblem&) {})));
    EXPECT_TRUE(refuses(with(e, [](LtProblem& p) { p.d.leading = 20; })));
    EXPECT_TRUE(refuses(with(e, [](LtProblem& p) { p.alignment = 8; })));
    EXPECT_TRUE(refuses(with(e, [](LtProblem& p) { p.d.type = LtType::kFp32; })));
    EXPECT_TRUE(refuses(with(e, [](LtProblem& p) { p.accumulates = true; })));
  }
  EXPECT_FALSE(
      refuses(with(LtEpilogue::kBiasGradient, [](LtProblem& p) { p.accumulates = true; })));
}

TEST(FakeLt, RefusesPointersOfAnotherEpilogue) {
  FakeLt api;
  const Product p = some_activated();
  const LtProblem problem = problem_of(p);
  const LtAlgorithm algorithm = api.algorithms(problem, 1, 0).front();
  const LtPointers good{.a = p.b_KN.const_data_ptr(),
                        .b = p.a_MK.const_data_ptr(),
                        .d = p.out_MN.mutable_data_ptr(),
                        .bias = p.bias_N.const_data_ptr(),
                        .aux = p.sum_MN.mutable_data_ptr()};
  const auto refuses = [&](LtPointers pointers) {
    try {
      api.multiply(problem, pointers, algorithm, device::accelerator()->current_stream());
    } catch (const c10::Error&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(refuses(good));
  LtPointers wrong = good;
  wrong.aux = nullptr;
  EXPECT_TRUE(refuses(wrong));
  wrong = good;
  wrong.bias = nullptr;
  EXPECT_TRUE(refuses(wrong));
  wrong = good;
  wrong.bias_gradient = good.aux;
  EXPECT_TRUE(refuses(wrong));
  wrong = good;
  wrong.aux = static_cast<char*>(good.aux) + 2;
  EXPECT_TRUE(refuses(wrong));
}

}  // namespace
}  // namespace capstan::ops
