// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/array.h"

namespace capstan::kernels::test {
namespace {

struct Case {
  DType dtype, weight_dtype;
  size_t rows, q_heads, k_heads, head_size, extra;  // extra: features behind q and k in a row of x
  bool has_positions;
  size_t shift = 0;
  [[nodiscard]] size_t heads() const { return q_heads + k_heads; }
  [[nodiscard]] size_t x_stride() const { return heads() * head_size + extra; }
  [[nodiscard]] size_t out_stride() const { return heads() * head_size; }
  [[nodiscard]] DType wide() const { return dtype == DType::kFp64 ? DType::kFp64 : DType::kFp32; }
};

constexpr size_t kLength = 32, kRowsPerSample = 3;
constexpr double kEps = 1e-6;

struct Inputs {
  Array x, grad, q_weight, k_weight, cos, sin, positions;
  explicit Inputs(const Case& c)
      : x(c.dtype, random_values(c.rows * c.x_stride(), 1), c.shift),
        grad(c.dtype, random_values(c.rows * c.out_stride(), 2), c.shift),
        q_weight(c.weight_dtype, random_values(c.head_size, 3)),
        k_weight(c.weight_dtype, random_values(c.head_size, 4)),
        cos(c.wide(), table(c, true)),
        sin(c.wide(), table(c, false)),
        positions(DType::kInt64, random_ids(c.rows, 5, kLength)) {}
  static Values table(const Case& c, bool is_cos) {
    Values out;
    for (size_t t = 0; t < kLength; ++t)
      for (size_t i = 0; i < c.head_size / 2; ++i) {
        const double angle = static_cast<double>(t) / (1.0 + static_cast<double>(i));
        out.push_back(is_cos ? std::cos(angle) : std::sin(angle));
      }
    return out;
  }
};

struct Expected {
  Values out, dx, q_weight, k_weight;
};
Expected reference(const Case& c, const Inputs& in) {
  const size_t H = c.head_size, half = H / 2;
  const Values x = in.x.values(), grad = in.grad.values(), cos = in.cos.values(),
               sin = in.sin.values(), positions = in.positions.values();
  Expected e{Values(c.rows * c.out_stride()), Values(c.rows * c.x_stride(), NAN), Values(H, 1.0),
             Values(H, 1.0)};
  for (size_t n = 0; n < c.rows; ++n)
    for (size_t head = 0; head < c.heads(); ++head) {
      const bool is_q = head < c.q_heads;
      const Values w = is_q ? in.q_weight.values() : in.k_weight.values();
      Values& dw = is_q ? e.q_weight : e.k_weight;
      const double* v = &x[n * c.x_stride() + head * H];
      const double* dy = &grad[n * c.out_stride() + head * H];
      const size_t at =
          (c.has_positions ? static_cast<size_t>(positions[n]) : n % kRowsPerSample) * half;
      double squares = 0, mean = 0;
      for (size_t i = 0; i < H; ++i) squares += v[i] * v[i];
      const double r = 1 / std::sqrt(squares / static_cast<double>(H) + kEps);
      Values g(H);
      for (size_t i = 0; i < half; ++i) {
        const double a = v[i] * r * w[i], b = v[i + half] * r * w[i + half];
        e.out[n * c.out_stride() + head * H + i] = a * cos[at + i] - b * sin[at + i];
        e.out[n * c.out_stride() + head * H + i + half] = b * cos[at + i] + a * sin[at + i];
        g[i] = dy[i] * cos[at + i] + dy[i + half] * sin[at + i];
        g[i + half] = dy[i + half] * cos[at + i] - dy[i] * sin[at + i];
      }
      for (size_t i = 0; i < H; ++i) {
        dw[i] += g[i] * v[i] * r;
        mean += g[i] * w[i] * v[i] * r / static_cast<double>(H);
      }
      for (size_t i = 0; i < H; ++i)
        e.dx[n * c.x_stride() + head * H + i] = r * (g[i] * w[i] - v[i] * r * mean);
    }
  return e;
}

QkNormShape shape_of(const Case& c, const Inputs& in) {
  const auto n = [](size_t value) { return static_cast<int64_t>(value); };
  return {.dtype = c.dtype,
          .weight_dtype = c.weight_dtype,
          .rows = n(c.rows),
          .q_heads = n(c.q_heads),
          .k_heads = n(c.k_heads),
          .head_size = n(c.head_size),
          .x_stride = n(c.x_stride()),
          .out_stride = n(c.out_stride()),
          .q_weight = in.q_weight.data(),
          .k_weight = in.k_weight.data(),
          .cos = in.cos.data(),
          .sin = in.sin.data(),
          .positions = c.has_positions ? in.positions.as<int64_t>() : nullptr,
          .rows_per_sample = kRowsPerSample};
}

// out, rstd, dx, grad_q_weight, grad_k_weight
std::vector<Array> run(const Case& c, const Inputs& in) {
  std::vector<Array> y;
  y.push_back(Array::of_size(c.dtype, c.rows * c.out_stride(), c.shift));
  y.push_back(Array::of_size(c.wide(), c.rows * c.heads()));
  y.push_back(Array::of_size(c.dtype, c.rows * c.x_stride(), c.shift));
  y.emplace_back(c.wide(), Values(c.head_size, 1.0));
  y.emplace_back(c.wide(), Values(c.head_size, 1.0));
  const auto groups = static_cast<size_t>(norm_partial_rows(static_cast<int64_t>(c.rows)));
  const Array partial = Array::of_size(c.wide(), 2 * groups * c.head_size);
  api().qk_norm_rope_forward({shape_of(c, in), kEps, in.x.data(), y[0].data(), y[1].data()},
                             nullptr);
  api().qk_norm_rope_backward({shape_of(c, in), in.x.data(), y[1].data(), in.grad.data(),
                               y[2].data(), y[3].data(), y[4].data(), partial.data()},
                              nullptr);
  return y;
}

class QkNorm : public KernelTest {};
TEST_F(QkNorm, ForwardAndBackward_MatchReference) {
  constexpr auto k16 = DType::kBf16, k32 = DType::kFp32, k64 = DType::kFp64;
  const std::vector<Case> cases = {
      {k16, k16, 5, 4, 2, 128, 256, true}, {k16, k32, 9, 3, 1, 64, 0, false},
      {k32, k32, 6, 2, 2, 256, 64, true},  {k64, k64, 4, 2, 1, 10, 3, true},
      {k16, k16, 3, 1, 0, 80, 0, true},    {k32, k32, 1, 1, 1, 2, 0, false},
      {k16, k16, 0, 2, 2, 64, 0, false},   {k32, k32, 3, 2, 2, 32, 5, true, 1},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message() << name_of(c.dtype) << " " << c.rows << " x (" << c.q_heads
                                    << " + " << c.k_heads << ") x " << c.head_size);
    const Inputs in(c);
    const auto out = same_bits([&] { return run(c, in); });
    const Expected e = reference(c, in);
    expect_close(out[0].values(), e.out, c.dtype, "out");
    expect_close(out[2].values(), e.dx, c.dtype, "dx");
    expect_close(out[3].values(), e.q_weight, c.wide(), "grad_q_weight");
    expect_close(out[4].values(), e.k_weight, c.wide(), "grad_k_weight");
  }
}

// As ops call it: dx takes the place of the gradient, out that of x.
TEST_F(QkNorm, ResultsInPlaceOfInputs_AreTheSame) {
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    const Case c{dtype, dtype, 5, 4, 2, 64, 0, true};
    const Inputs in(c);
    const auto apart = run(c, in);
    const Array partial = Array::of_size(
        c.wide(), 2 * static_cast<size_t>(norm_partial_rows(static_cast<int64_t>(c.rows))) * 64);
    const Inputs same(c);
    api().qk_norm_rope_backward(
        {shape_of(c, same), same.x.data(), apart[1].data(), same.grad.data(), same.grad.data(),
         nullptr, nullptr, partial.data()},
        nullptr);
    EXPECT_EQ(same.grad.values(), apart[2].values());
    const Array rstd = Array::of_size(c.wide(), c.rows * c.heads());
    api().qk_norm_rope_forward({shape_of(c, same), kEps, same.x.data(), same.x.data(), rstd.data()},
                               nullptr);
    EXPECT_EQ(same.x.values(), apart[0].values());
  }
}

}  // namespace
}  // namespace capstan::kernels::test
