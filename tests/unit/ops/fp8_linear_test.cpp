// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/fp8_linear.h"

#include <gtest/gtest.h>

#include <cmath>

#include "capstan/ops/linear.h"
#include "unit/ops/fp8_reference.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;
using testing::PlainStoreOptions;
using testing::through_fp8;

constexpr int64_t kTokens = 32, kIn = 16, kOut = 48;
const PlainStoreOptions kBf16{.values = at::kBFloat16, .gradients = at::kFloat};

std::vector<plan::ParamSpec> table() { return {param_spec("w", {kOut, kIn})}; }
Projection projection_of(PlainStore& store) { return {{store.find("w")}, {}}; }

struct Case {
  Fp8Scaling scaling;
  Fp8Format gradients;
  bool deferred, keeps_weights;
};
std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto scaling : {Fp8Scaling::kTensor, Fp8Scaling::kRow, Fp8Scaling::kDelayed})
    for (const auto gradients : {Fp8Format::kE5m2, Fp8Format::kE4m3})
      for (const bool second : {false, true}) all.push_back({scaling, gradients, second, !second});
  return all;
}
Fp8Options options_of(const Case& c) {
  return {.scaling = c.scaling,
          .gradients = c.gradients,
          .keeps_weights = c.keeps_weights,
          .history = 2,
          .projections = {"w"}};
}

// |a - b| is explained by one rounding to bf16 and the fp32 sum of 48 products.
bool is_rounded(const Tensor& a, const Tensor& b, const Tensor& sizes) {
  const Tensor bound = b.abs() * std::exp2(-8) + sizes * std::exp2(-18);
  return ((a.to(at::kDouble) - b).abs() <= bound).all().item<bool>();
}

// The same without the rounding to bf16.
bool is_fp32(const Tensor& a, const Tensor& b, const Tensor& size) {
  const Tensor bound = size * (68 * std::exp2(-24));
  return ((a.to(at::kDouble) - b).abs() <= bound).all().item<bool>();
}

// a b^T of two factors on the way through fp8, as book and as a bound on its size.
struct Product {
  Tensor value, size;
};
Product product(const Tensor& a, Fp8Format format, const Tensor& b, bool by_row) {
  const auto pass = [&](const Tensor& x, Fp8Format f) {
    return through_fp8(x, f, by_row ? 0 : x.abs().max().item<double>());
  };
  const Tensor qa = pass(a, format), qb = pass(b, Fp8Format::kE4m3);
  return {at::mm(qa, qb.t()), at::mm(qa.abs(), qb.abs().t())};
}

TEST(Fp8Linear, ForwardAndGradientsAreThoseOfTheBook) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(::testing::Message()
                 << "scaling " << static_cast<int>(c.scaling) << " gradients "
                 << static_cast<int>(c.gradients) << " deferred " << c.deferred);
    PlainStoreOptions store_options = kBf16;
    store_options.deferred = c.deferred;
    PlainStore store(table(), store_options);
    Fp8Linear fp8(options_of(c));
    const Tensor x = leaf((normal({2, kTokens / 2, kIn}, 1) * 0.3).to(at::kBFloat16));
    const Tensor grad = (normal({2, kTokens / 2, kOut}, 2) * 1e-3).to(at::kBFloat16);
    grad[1][3] *= 40;
    const Tensor y = linear(x, projection_of(store), true, {.fp8 = &fp8, .observes = true});
    run_backward(y, grad);
    store.run_deferred();
    const bool by_row = c.scaling == Fp8Scaling::kRow;
    const Tensor x_ND = x.detach().view({kTokens, kIn}), g_NO = grad.view({kTokens, kOut});
    const Tensor w_OD = store.value_of("w").detach();
    const Product forward = product(x_ND, Fp8Format::kE4m3, w_OD, by_row);
    EXPECT_TRUE(is_rounded(y.detach().view({kTokens, kOut}), forward.value, forward.size));
    const Product dx = product(g_NO, c.gradients, w_OD.t().contiguous(), by_row);
    EXPECT_TRUE(is_rounded(x.grad().view({kTokens, kIn}), dx.value, dx.size));
    const Product dw = product(g_NO.t().contiguous(), c.gradients, x_ND.t().contiguous(), by_row);
    EXPECT_TRUE(is_fp32(store.gradient_of("w"), dw.value, dw.size));
    // Not by accident: what fp8 leaves out is larger.
    const Tensor plain = linear(x.detach(), projection_of(store));
    EXPECT_FALSE(is_rounded(plain.view({kTokens, kOut}), forward.value, forward.size));
  }
}

TEST(Fp8Linear, BiasAndSecondBackwardAdd) {
  PlainStore store({param_spec("w", {kOut, kIn}), param_spec("b", {kOut})}, kBf16);
  Fp8Linear fp8({});
  const Projection with_bias{{store.find("w")}, {store.find("b")}};
  const Tensor x = normal({kTokens, kIn}, 1).to(at::kBFloat16);
  const Tensor grad = normal({kTokens, kOut}, 2).to(at::kBFloat16);
  const LinearMode mode{.fp8 = &fp8, .observes = true};
  const Tensor y = linear(x, with_bias, true, mode), b = store.value_of("b").detach();
  const Product forward = product(x, Fp8Format::kE4m3, store.value_of("w").detach(), false);
  EXPECT_TRUE(is_rounded(y.detach(), forward.value + b, forward.size + b.abs()));
  run_backward(y, grad);
  const Tensor once = store.gradient_of("w").clone();
  run_backward(linear(x, with_bias, true, mode), grad);
  EXPECT_TRUE(testing::near(store.gradient_of("w"), 2 * once));
  EXPECT_TRUE(testing::near(store.gradient_of("b"), 2 * grad.to(at::kFloat).sum(0)));
}

TEST(Fp8Linear, CastsOfWeightsStayUntilTheyChange) {
  for (const bool keeps : {true, false}) {
    PlainStore store(table(), kBf16);
    Fp8Linear fp8({.keeps_weights = keeps});
    const Tensor x = normal({kTokens, kIn}, 1).to(at::kBFloat16);
    const auto run = [&] {
      const at::NoGradGuard no_grad;
      return linear(x, projection_of(store), true, {.fp8 = &fp8});
    };
    const Tensor before = run();
    {
      const at::NoGradGuard no_grad;
      store.value_of("w").mul_(2);
    }
    EXPECT_TRUE(at::equal(run(), keeps ? before : 2 * before));
    store.touch();
    EXPECT_TRUE(at::equal(run(), 2 * before));
  }
}

TEST(Fp8Linear, WideWeight_IsMultipliedAsItIs) {
  auto wide = table();
  wide[0].wide = true;
  PlainStoreOptions options = kBf16;
  options.wide = at::kFloat;
  PlainStore store(wide, options);
  Fp8Linear fp8({});
  const Tensor x = normal({kTokens, kIn}, 1).to(at::kBFloat16);
  EXPECT_TRUE(at::equal(linear(x, projection_of(store), true, {.fp8 = &fp8}).detach(),
                        linear(x, projection_of(store)).detach()));
}

class DelayedScaling : public ::testing::Test {
 protected:
  // One micro-batch of x of this size; the maximum of the result's error tells the scale.
  Tensor run(double size, bool observes = true) {
    Tensor x = leaf((normal({kTokens, kIn}, 1) * size).to(at::kBFloat16));
    const Tensor y = linear(x, projection_of(store_), true, {.fp8 = &fp8_, .observes = observes});
    if (observes) run_backward(y, normal({kTokens, kOut}, 2));
    return y.detach();
  }
  // What scales of `largest` times the unit batch give.
  Tensor expected(double size, double largest) {
    const Tensor x = (normal({kTokens, kIn}, 1) * size).to(at::kBFloat16);
    const double unit = normal({kTokens, kIn}, 1).to(at::kBFloat16).abs().max().item<double>();
    const Tensor w = store_.value_of("w").detach();
    const Tensor product_NO =
        at::mm(through_fp8(x, Fp8Format::kE4m3, largest * unit),
               through_fp8(w, Fp8Format::kE4m3, w.abs().max().item<double>()).t());
    return product_NO.to(at::kFloat).to(at::kBFloat16);
  }
  void expect_scaled(double size, double largest) {
    EXPECT_TRUE(testing::near(run(size, false), expected(size, largest)))
        << size << " by " << largest;
  }

  PlainStore store_{table(), kBf16};
  Fp8Linear fp8_{{.scaling = Fp8Scaling::kDelayed, .history = 2, .projections = {"w"}}};
};

TEST_F(DelayedScaling, FirstStep_TakesItsOwnMaximum_LaterOnesTheHistory) {
  expect_scaled(4, 4);
  (void)run(4);
  (void)run(2);  // the second micro-batch of the step
  expect_scaled(1, 1);
  fp8_.finish_step(true);
  expect_scaled(1, 4);
  expect_scaled(64, 4);  // saturates
  (void)run(1);
  fp8_.finish_step(true);
  expect_scaled(1, 4);  // two steps back
  (void)run(1);
  fp8_.finish_step(true);
  expect_scaled(1, 1);  // out of the window
}

TEST_F(DelayedScaling, EvaluationAndSkippedSteps_LeaveNoTrace) {
  (void)run(1);
  fp8_.finish_step(true);
  const Tensor history = fp8_.history_HP2().clone();
  (void)run(8, false);
  EXPECT_EQ(fp8_.step_maxima_P2().abs().max().item<float>(), 0);
  (void)run(8);
  EXPECT_GT(fp8_.step_maxima_P2().min().item<float>(), 0);
  fp8_.finish_step(false);
  EXPECT_TRUE(at::equal(fp8_.history_HP2(), history));
  EXPECT_EQ(fp8_.step_maxima_P2().abs().max().item<float>(), 0);
  expect_scaled(1, 1);
}

// What a device does with its flag is what the host does when it knows.
TEST_F(DelayedScaling, StepsThatTheDeviceDecides_MoveTheHistoryAlike) {
  const Fp8Options options{.scaling = Fp8Scaling::kDelayed, .history = 3, .projections = {"w"}};
  Fp8Linear host(options), device(options);
  float size = 1;
  for (const bool applied : {false, true, true, false, true, false, true, true}) {
    ++size;
    for (const Fp8Linear* one : {&host, &device}) one->step_maxima_P2().fill_(size);
    host.finish_step(applied);
    device.finish_step_on_device(at::scalar_tensor(applied ? 0 : 1, at::kInt));
    EXPECT_TRUE(at::equal(device.history_HP2(), host.history_HP2()));
    EXPECT_EQ(device.step_maxima_P2().abs().max().item<float>(), 0);
  }
  EXPECT_TRUE(device.note_applied());
  EXPECT_FALSE(device.note_applied());
  const at::NoGradGuard no_grad;
  const Tensor x = normal({kTokens, kIn}, 1).to(at::kBFloat16);
  EXPECT_TRUE(at::equal(linear(x, projection_of(store_), true, {.fp8 = &device}),
                        linear(x, projection_of(store_), true, {.fp8 = &host})));
}

TEST_F(DelayedScaling, HistoryOfACheckpoint_GoesOn) {
  (void)run(4);
  fp8_.finish_step(true);
  Fp8Linear other({.scaling = Fp8Scaling::kDelayed, .history = 2, .projections = {"w"}});
  other.history_HP2().copy_(fp8_.history_HP2());
  other.refresh();
  const at::NoGradGuard no_grad;
  const Tensor x = normal({kTokens, kIn}, 1).to(at::kBFloat16);
  EXPECT_TRUE(at::equal(linear(x, projection_of(store_), true, {.fp8 = &other}),
                        linear(x, projection_of(store_), true, {.fp8 = &fp8_})));
}

}  // namespace
}  // namespace capstan::ops
