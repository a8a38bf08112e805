// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/gradient_check.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "capstan/base/philox.h"

namespace capstan::testing {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

Tolerance tolerance_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return {1e-11, 1e-11};
    case at::kFloat:
      return {2e-5, 2e-5};
    default:
      return {2e-2, 1e-2};
  }
}

AssertionResult near(const at::Tensor& got_in, const at::Tensor& want_in, Tolerance tolerance) {
  if (!got_in.defined() || !want_in.defined())
    return got_in.defined() == want_in.defined() ? AssertionSuccess()
                                                 : AssertionFailure() << "one is undefined";
  if (got_in.sizes() != want_in.sizes())
    return AssertionFailure() << "shapes " << got_in.sizes() << " and " << want_in.sizes();
  const at::Tensor got = got_in.detach().to(at::kDouble).contiguous();
  const at::Tensor want = want_in.detach().to(at::kDouble).contiguous();
  const auto* const g = got.const_data_ptr<double>();
  const auto* const w = want.const_data_ptr<double>();
  for (int64_t i = 0; i < got.numel(); ++i) {
    const bool same = g[i] == w[i] || (std::isnan(g[i]) && std::isnan(w[i]));
    const double limit = tolerance.rtol * std::abs(w[i]) + tolerance.atol;
    if (!same && !(std::abs(g[i] - w[i]) <= limit))
      return AssertionFailure() << fmt::format("element {} of {}: got {:.17g}, want {:.17g}", i,
                                               got.numel(), g[i], w[i]);
  }
  return AssertionSuccess();
}

AssertionResult near(const at::Tensor& got, const at::Tensor& want) {
  if (!got.defined() || !want.defined()) return near(got, want, Tolerance{0, 0});
  const Tolerance a = tolerance_of(got.scalar_type()), b = tolerance_of(want.scalar_type());
  Tolerance tolerance = a.rtol > b.rtol ? a : b;
  const double scale =
      want.numel() > 0 ? want.detach().to(at::kDouble).abs().max().item<double>() : 1;
  tolerance.atol *= std::isfinite(scale) ? std::max(scale, 1e-3) : 1.0;
  return near(got, want, tolerance);
}

AssertionResult is_gradient(const std::function<double()>& loss, const at::Tensor& variable,
                            const at::Tensor& gradient, int64_t samples) {
  if (!gradient.defined()) return AssertionFailure() << "no gradient";
  if (gradient.sizes() != variable.sizes())
    return AssertionFailure() << "shape " << gradient.sizes() << " for " << variable.sizes();
  const at::Tensor claimed = gradient.detach().to(at::kDouble).contiguous();
  auto* const x = variable.data_ptr<double>();
  const auto* const g = claimed.const_data_ptr<double>();
  const double scale = claimed.abs().max().item<double>();
  const int64_t count = variable.numel(), step = std::max<int64_t>(1, count / samples);
  for (int64_t i = 0; i < count; i += step) {
    const double kept = x[i], h = 1e-5;
    x[i] = kept + h;
    const double above = loss();
    x[i] = kept - h;
    const double below = loss();
    x[i] = kept;
    const double slope = (above - below) / (2 * h);
    if (!(std::abs(slope - g[i]) <= 2e-6 * std::max(scale, 1e-3)))
      return AssertionFailure() << fmt::format("element {}: claimed {:.12g}, difference {:.12g}", i,
                                               g[i], slope);
  }
  return AssertionSuccess();
}

at::Tensor normal(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype) {
  const at::Tensor out = at::empty(sizes, at::kDouble);
  philox::fill_normal(std::span<double>(out.data_ptr<double>(), out.numel()), seed,
                      philox::stream_of("test"), 0, 1.0);
  return out.to(dtype);
}

}  // namespace capstan::testing
