// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Two projections with GELU between them, against the ops of each alone.
#include "capstan/ops/linear_gelu.h"

#include <gtest/gtest.h>

#include "capstan/ops/keep.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;
using testing::PlainStoreOptions;

constexpr GeluForm kForms[] = {GeluForm::kTanh, GeluForm::kErf};
enum class Shape { kApart, kTogether, kRemade };

struct Mlp {
  PlainStore store;
  explicit Mlp(PlainStoreOptions options = {})
      : store({param_spec("up", {6, 5}), param_spec("up_bias", {6}), param_spec("down", {4, 6}),
               param_spec("down_bias", {4})},
              std::move(options)) {}
  Projection up() { return {{store.find("up")}, {store.find("up_bias")}}; }
  Projection down() { return {{store.find("down")}, {store.find("down_bias")}}; }

  Tensor run(const Tensor& x, GeluForm form, Shape shape) {
    if (shape == Shape::kApart) return linear(gelu(linear(x, up()), form), down());
    if (shape == Shape::kTogether) return linear(linear_gelu(x, up(), form), down());
    return linear(
        remake(x, [this, form](const Tensor& in,
                               bool) { return activation_of(linear_gelu(in, up(), form)); }),
        down());
  }
};
constexpr const char* kNames[] = {"up", "up_bias", "down", "down_bias"};

TEST(LinearGelu, IsTheOpsOneAfterAnother) {
  for (const GeluForm form : kForms)
    for (const Shape shape : {Shape::kTogether, Shape::kRemade})
      for (const bool deferred : {false, true}) {
        Mlp apart({.deferred = deferred}), got({.deferred = deferred});
        const Tensor x = leaf(normal({2, 3, 5}, 1)), x_got = leaf(x), w = normal({2, 3, 4}, 2);
        const Tensor want = apart.run(x, form, Shape::kApart), y = got.run(x_got, form, shape);
        EXPECT_TRUE(at::equal(y, want));
        run_backward(want, w);
        run_backward(y, w);
        apart.store.run_deferred();
        got.store.run_deferred();
        EXPECT_TRUE(testing::near(x_got.grad(), x.grad()));
        for (const char* name : kNames)
          EXPECT_TRUE(testing::near(got.store.gradient_of(name), apart.store.gradient_of(name)))
              << name;
      }
}

TEST(LinearGelu, GradientsMatchDifferences) {
  for (const GeluForm form : kForms) {
    Mlp mlp;
    const Tensor x = leaf(normal({7, 5}, 1)), w = normal({7, 4}, 2);
    run_backward(mlp.run(x, form, Shape::kTogether), w);
    const auto loss = [&] {
      at::NoGradGuard no_grad;
      return weighted_sum(mlp.run(x, form, Shape::kTogether), w);
    };
    EXPECT_TRUE(testing::is_gradient(loss, x.detach(), x.grad()));
    for (const char* name : kNames)
      EXPECT_TRUE(testing::is_gradient(loss, mlp.store.value_of(name), mlp.store.gradient_of(name)))
          << name;
  }
}

// A frozen weight takes no gradient and does not stop the one behind it.
TEST(LinearGelu, FrozenParts) {
  for (const char* frozen : {"up", "up_bias", "down", "down_bias"}) {
    Mlp apart({.frozen = {frozen}}), got({.frozen = {frozen}});
    const Tensor x = normal({7, 5}, 1), w = normal({7, 4}, 2);
    run_backward(apart.run(x, GeluForm::kTanh, Shape::kApart), w);
    run_backward(got.run(x, GeluForm::kTanh, Shape::kTogether), w);
    for (const char* name : kNames) {
      ASSERT_EQ(got.store.has_gradient(name), std::string(name) != frozen) << name;
      if (std::string(name) == frozen) continue;
      EXPECT_TRUE(testing::near(got.store.gradient_of(name), apart.store.gradient_of(name)))
          << name;
    }
  }
}

// fp32 weights beside bf16 activations, biases of another type: no single product, the same
// numbers.
TEST(LinearGelu, MixedTypesAreMultipliedAsEver) {
  const PlainStoreOptions options{.values = at::kFloat, .gradients = at::kFloat};
  Mlp apart(options), got(options);
  const Tensor x = leaf(normal({7, 5}, 1, at::kBFloat16)), x_got = leaf(x);
  const Tensor w = normal({7, 4}, 2);
  const Tensor want = apart.run(x, GeluForm::kTanh, Shape::kApart),
               y = got.run(x_got, GeluForm::kTanh, Shape::kTogether);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(y, want));
  run_backward(want, w);
  run_backward(y, w);
  EXPECT_TRUE(at::equal(x_got.grad(), x.grad()));
}

}  // namespace
}  // namespace capstan::ops
