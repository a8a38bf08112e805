// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Case {
  DType dtype;
  size_t rows, features;
  size_t shift = 0;
};

double act(Activation kind, double g) {
  switch (kind) {
    case Activation::kSilu:
      return g / (1 + std::exp(-g));
    case Activation::kGeluTanh:
      return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
    default:
      return 0.5 * g * (1 + std::erf(g / std::sqrt(2.0)));
  }
}
// Central difference of fourth order: independent of the kernel's own derivative.
double slope(Activation kind, double g) {
  const double h = 1e-3;
  return (8 * (act(kind, g + h) - act(kind, g - h)) -
          (act(kind, g + 2 * h) - act(kind, g - 2 * h))) /
         (12 * h);
}

struct Expected {
  Values forward, backward;
};
Expected reference(const Case& c, Activation kind, bool gated, const Values& x,
                   const Values& grad) {
  Expected e;
  const size_t row_width = gated ? 2 * c.features : c.features;
  e.forward.resize(c.rows * c.features);
  e.backward.resize(c.rows * row_width);
  for (size_t n = 0; n < c.rows; ++n)
    for (size_t f = 0; f < c.features; ++f) {
      const double g = x[n * row_width + f], d = grad[n * c.features + f];
      const double up = gated ? x[n * row_width + c.features + f] : 1;
      e.forward[n * c.features + f] = act(kind, g) * up;
      e.backward[n * row_width + f] = d * up * slope(kind, g);
      if (gated) e.backward[n * row_width + c.features + f] = d * act(kind, g);
    }
  return e;
}

void check_case(const Case& c, Activation kind, bool gated) {
  SCOPED_TRACE(testing::Message() << name_of(c.dtype) << " " << c.rows << " x " << c.features
                                  << ", activation " << static_cast<int>(kind)
                                  << (gated ? " gated" : ""));
  const size_t row_width = gated ? 2 * c.features : c.features;
  const Array x(c.dtype, random_values(c.rows * row_width, 1, 2.0), c.shift);
  const Array grad(c.dtype, random_values(c.rows * c.features, 2), c.shift);
  ActivationArgs args{.dtype = c.dtype,
                      .activation = kind,
                      .gated = gated,
                      .rows = static_cast<int64_t>(c.rows),
                      .features = static_cast<int64_t>(c.features),
                      .x = x.data()};
  const auto out = same_bits([&] {
    std::vector<Array> y;
    y.push_back(Array::of_size(c.dtype, c.rows * c.features, c.shift));
    y.emplace_back(c.dtype, x.values(), c.shift);
    y.emplace_back(c.dtype, grad.values(), c.shift);
    args.x = x.data();
    args.grad = nullptr;
    args.out = y[0].data();
    api().activation_forward(args, nullptr);
    args.x = args.out = y[1].data();  // in place
    args.grad = grad.data();
    api().activation_backward(args, nullptr);
    if (gated) return y;
    args.x = x.data();
    args.grad = args.out = y[2].data();
    api().activation_backward(args, nullptr);
    return y;
  });
  const Expected e = reference(c, kind, gated, x.values(), grad.values());
  const Tolerance t = c.dtype == DType::kFp64 ? Tolerance{1e-9, 1e-9} : tolerance_of(c.dtype);
  expect_close(out[0].values(), e.forward, t, "out");
  expect_close(out[1].values(), e.backward, t, "dx");
  if (!gated) expect_close(out[2].values(), e.backward, t, "dx over the gradient");
}

class GatedActivation : public KernelTest {};
TEST_F(GatedActivation, ForwardAndBackward_MatchReference) {
  const std::vector<Case> cases = {
      {DType::kBf16, 3, 256},  {DType::kFp32, 5, 64},    {DType::kFp64, 2, 30},
      {DType::kBf16, 2, 4864}, {DType::kBf16, 3, 37},    {DType::kFp32, 1, 1},
      {DType::kBf16, 0, 64},   {DType::kFp32, 2, 64, 1},
  };
  for (const Case& c : cases)
    for (const auto kind : {Activation::kSilu, Activation::kGeluTanh, Activation::kGeluErf})
      for (const bool gated : {true, false}) check_case(c, kind, gated);
}

}  // namespace
}  // namespace capstan::kernels::test
