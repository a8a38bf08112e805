// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/record.h"

#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

Tensor twice(const Tensor& x, int* calls) {
  Tensor y;
  {
    at::NoGradGuard no_grad;
    y = 2 * x;
  }
  return record(
      y, {"twice", {x}, {}, {x, y}, [calls](const Tensors& saved, Tensors& grads) -> Tensors {
            ++*calls;
            EXPECT_TRUE(at::equal(saved[1], 2 * saved[0]));
            return {2 * grads[0]};
          }});
}

TEST(Record, ChainsAndKeepsSavedTensors) {
  int calls = 0;
  const Tensor x = leaf(normal({4}, 1));
  Tensor y = twice(twice(x, &calls), &calls);
  run_backward(y, at::ones({4}));
  EXPECT_EQ(calls, 2);
  EXPECT_TRUE(testing::near(x.grad(), at::full({4}, 4.0, at::kDouble)));
}

TEST(Record, WithoutGradientsThereIsNoNode) {
  int calls = 0;
  EXPECT_FALSE(twice(normal({4}, 1), &calls).requires_grad());
  const Tensor x = leaf(normal({4}, 1));
  at::NoGradGuard no_grad;
  EXPECT_FALSE(twice(x, &calls).requires_grad());
  EXPECT_FALSE(needs_backward({x}, {}));
}

TEST(Record, SavedTensorsAreFreedAfterBackward) {
  const auto held = std::make_shared<int>(0);
  const Tensor x = leaf(normal({4}, 1));
  Tensor big = normal({1000}, 2);
  const Tensor y = record(
      (x * 1).detach(),
      {"hold", {x}, {}, {big}, [held](const Tensors&, Tensors& g) -> Tensors { return {g[0]}; }});
  EXPECT_GT(big.use_count(), 1U);
  EXPECT_GT(held.use_count(), 1);
  run_backward(y, at::ones({4}));
  EXPECT_EQ(big.use_count(), 1U);
  EXPECT_EQ(held.use_count(), 1);
  EXPECT_THROW(run_backward(y, at::ones({4})), InternalError);
}

TEST(Record, SeveralOutputsShareOneBackward) {
  const Tensor x = leaf(normal({3}, 1));
  const Tensor a = x.detach().clone(), b = x.detach() * 3;
  int calls = 0;
  record(Tensors{a, b}, {"two", {x}, {}, {}, [&calls](const Tensors&, Tensors& g) -> Tensors {
                           ++calls;
                           EXPECT_TRUE(g[0].defined());
                           EXPECT_FALSE(g[1].defined());
                           return {g[0]};
                         }});
  EXPECT_TRUE(b.requires_grad());
  run_backward(a, at::ones({3}));
  EXPECT_EQ(calls, 1);
}

TEST(Record, AnchorMakesBackwardRun_AndVersionIsChecked) {
  testing::PlainStore store({param_spec("w", {3})}, {});
  const Param w = store.find("w");
  const auto forward = [&] {
    return record(w.value() * 1, {"use", {}, {w}, {}, [w](const Tensors&, Tensors& g) -> Tensors {
                                    const Tensor grad = g[0];
                                    w.accumulate([grad](param::GradSlot& slot) {
                                      param::add_to_slot(slot, grad);
                                    });
                                    return {};
                                  }});
  };
  const Tensor y = forward();
  ASSERT_TRUE(y.requires_grad());
  run_backward(y, at::ones({3}));
  EXPECT_TRUE(testing::near(store.gradient_of("w"), at::ones({3}, at::kDouble)));
  const Tensor stale = forward();
  store.touch();
  EXPECT_THROW(run_backward(stale, at::ones({3})), InternalError);
}

TEST(Record, OwnOrCopyNeverTouchesSharedMemory) {
  Tensor alone = normal({4}, 1);
  void* const memory = alone.data_ptr();
  EXPECT_EQ(own_or_copy(std::move(alone)).data_ptr(), memory);
  const Tensor shared = normal({4}, 1);
  EXPECT_NE(own_or_copy(shared).data_ptr(), shared.data_ptr());
  const Tensor base = normal({4}, 1);
  EXPECT_NE(own_or_copy(base.view({2, 2})).data_ptr(), base.data_ptr());
  EXPECT_TRUE(own_or_copy(at::ones({1}).expand({5})).is_contiguous());
}

TEST(Path, GuardsNest) {
  const Path outside = path();
  {
    const PathGuard a(Path::kReference);
    EXPECT_EQ(path(), Path::kReference);
    {
      const PathGuard b(Path::kFused);
      EXPECT_EQ(path(), Path::kFused);
    }
    EXPECT_EQ(path(), Path::kReference);
  }
  EXPECT_EQ(path(), outside);
}

}  // namespace
}  // namespace capstan::ops
