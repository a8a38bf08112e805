// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Weight gradients on a device: products of 16-bit factors, summed in fp32 buffers without a
// rounding in between.
#include <gtest/gtest.h>

#include <limits>

#include "capstan/device/accelerator.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/path.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;

Tensor on_device(const Tensor& x) { return x.to(device::run_device()); }
Tensor wide(const Tensor& x) { return x.to(at::kCPU, at::kDouble); }

// Far below a rounding to bf16 (2^-8) or fp16 (2^-11).
constexpr testing::Tolerance kFp32{2e-5, 2e-5};

struct Shape {
  int64_t tokens, rows, columns;
};

TEST(GpuLinear, WeightGradientsAreSummedInFp32) {
  for (const auto dtype : {at::kBFloat16, at::kHalf})
    for (const Shape& s : {Shape{40, 24, 16}, Shape{7, 9, 5}, Shape{1, 8, 8}, Shape{0, 4, 3}}) {
      const Tensor grad = on_device(normal({s.tokens, s.rows}, 1, dtype)),
                   x = on_device(normal({s.tokens, s.columns}, 2, dtype));
      const Tensor product = at::mm(wide(grad).t(), wide(x));
      const double nan = std::numeric_limits<double>::quiet_NaN();
      param::GradSlot slot{on_device(at::full({s.rows, s.columns}, nan, at::kFloat)), true};
      add_outer_product(slot, grad, x);
      EXPECT_FALSE(slot.overwrite);
      EXPECT_TRUE(testing::near(wide(slot.buffer), product, kFp32));
      add_outer_product(slot, grad, x);
      add_outer_product(slot, grad, x);
      EXPECT_TRUE(testing::near(wide(slot.buffer), 3 * product, kFp32));
    }
}

// Rows of a larger buffer, as the joined weights of a block have them; the others stay.
TEST(GpuLinear, RowsOfABufferAreWrittenInPlace) {
  const Tensor grad = on_device(normal({40, 12}, 1, at::kBFloat16)),
               x = on_device(normal({40, 8}, 2, at::kBFloat16));
  const Tensor all = on_device(at::full({20, 8}, 7, at::kFloat));
  param::GradSlot slot{all.narrow(0, 4, 12), false};
  add_outer_product(slot, grad, x);
  const Tensor want = at::full({20, 8}, 7, at::kDouble);
  want.narrow(0, 4, 12).add_(at::mm(wide(grad).t(), wide(x)));
  EXPECT_TRUE(testing::near(wide(all), want, kFp32));
}

TEST(GpuLinear, TheReferenceIsClose) {
  const Tensor grad = on_device(normal({40, 12}, 1, at::kBFloat16)),
               x = on_device(normal({40, 8}, 2, at::kBFloat16));
  param::GradSlot fused{on_device(at::zeros({12, 8}, at::kFloat)), false};
  param::GradSlot plain{fused.buffer.clone(), false};
  add_outer_product(fused, grad, x);
  const PathGuard guard(Path::kReference);
  add_outer_product(plain, grad, x);
  EXPECT_TRUE(
      testing::near(wide(plain.buffer), wide(fused.buffer), testing::tolerance_of(at::kBFloat16)));
}

}  // namespace
}  // namespace capstan::ops
