// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/reference_norm.h"

#include <cmath>

namespace capstan::kernels::test {

NormOutput norm_forward(const NormInput& in) {
  NormOutput out{Values(in.rows * in.width), Values(in.rows), Values(in.rows)};
  const auto width = static_cast<double>(in.width);
  for (size_t n = 0; n < in.rows; ++n) {
    const double* x = in.x.data() + n * in.width;
    double mean = 0, squares = 0;
    for (size_t d = 0; in.centered && d < in.width; ++d) mean += x[d] / width;
    for (size_t d = 0; d < in.width; ++d) squares += (x[d] - mean) * (x[d] - mean);
    out.mean[n] = mean;
    out.rstd[n] = 1 / std::sqrt(squares / width + in.eps);
    for (size_t d = 0; d < in.width; ++d)
      out.normed[n * in.width + d] =
          (x[d] - mean) * out.rstd[n] * in.weight[d] + (in.bias.empty() ? 0.0 : in.bias[d]);
  }
  return out;
}

NormGradients norm_backward(const NormInput& in, const Values& grad, const Values& grad_residual) {
  const NormOutput stats = norm_forward(in);
  NormGradients out{Values(in.x.size()), Values(in.width), Values(in.width)};
  for (size_t n = 0; n < in.rows; ++n) {
    double mean_g = 0, mean_gh = 0;
    const auto h = [&](size_t d) {
      return (in.x[n * in.width + d] - stats.mean[n]) * stats.rstd[n];
    };
    for (size_t d = 0; d < in.width; ++d) {
      const double dy = grad[n * in.width + d], g = dy * in.weight[d];
      if (in.centered) mean_g += g / static_cast<double>(in.width);
      mean_gh += g * h(d) / static_cast<double>(in.width);
      out.weight[d] += dy * h(d);
      out.bias[d] += dy;
    }
    for (size_t d = 0; d < in.width; ++d) {
      const size_t i = n * in.width + d;
      out.dx[i] = stats.rstd[n] * (grad[i] * in.weight[d] - mean_g - h(d) * mean_gh) +
                  (grad_residual.empty() ? 0.0 : grad_residual[i]);
    }
  }
  return out;
}

}  // namespace capstan::kernels::test
