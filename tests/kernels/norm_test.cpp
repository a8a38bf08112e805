// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/reference_norm.h"

namespace capstan::kernels::test {
namespace {

struct Case {
  NormTypes types;
  size_t rows, width;
  bool centered, has_hidden, has_residual_grad;
  size_t shift = 0;
};

std::vector<Case> cases(bool centered) {
  constexpr auto k32 = DType::kFp32, k16 = DType::kBf16, k64 = DType::kFp64;
  return {
      {{k32, k32, k32}, 3, 64, centered, true, true},
      {{k32, k16, k16}, 9, 256, centered, true, true},
      {{k32, k16, k32}, 5, 96, centered, false, true},
      {{k16, k16, k16}, 6, 128, centered, true, false},
      {{k16, k16, k32}, 2, 512, centered, true, true},
      {{k64, k64, k64}, 4, 30, centered, true, true},
      {{k32, k32, k32}, 1, 37, centered, true, true},     // odd width, one row
      {{k32, k16, k16}, 3, 771, centered, true, true},    // odd width, several warps
      {{k32, k32, k32}, 2, 64, centered, true, true, 1},  // nothing aligned
      {{k16, k16, k16}, 2, 1, centered, true, true},
      {{k32, k32, k32}, 0, 64, centered, true, true},
      {{k32, k16, k16}, 2, 4352, centered, true, true},   // four pieces per thread
      {{k32, k16, k32}, 1, 16384, centered, true, true},  // the widest
      {{k32, k32, k32}, 1, 8191, centered, false, true},
  };
}

struct Inputs {
  Array residual, hidden, weight, bias, grad, grad_residual;
  explicit Inputs(const Case& c)
      : residual(c.types.residual, random_values(c.rows * c.width, 1), c.shift),
        hidden(c.types.compute, random_values(c.rows * c.width, 2), c.shift),
        weight(c.types.weight, random_values(c.width, 3), c.shift),
        bias(c.types.weight, random_values(c.width, 4), c.shift),
        grad(c.types.compute, random_values(c.rows * c.width, 5), c.shift),
        grad_residual(c.types.residual, random_values(c.rows * c.width, 6), c.shift) {}
};

DType wide(const Case& c) { return c.types.residual == DType::kFp64 ? DType::kFp64 : DType::kFp32; }
NormShape shape(const Case& c) {
  return {static_cast<int64_t>(c.rows), static_cast<int64_t>(c.width)};
}

// sum, normed, mean, rstd
std::vector<Array> forward(const Case& c, const Inputs& in) {
  std::vector<Array> out;
  out.push_back(Array::of_size(c.types.residual, c.rows * c.width, c.shift));
  out.push_back(Array::of_size(c.types.compute, c.rows * c.width, c.shift));
  out.push_back(Array::zeros(wide(c), c.rows));
  out.push_back(Array::of_size(wide(c), c.rows));
  const NormForwardArgs args{.types = c.types,
                             .shape = shape(c),
                             .residual = in.residual.data(),
                             .hidden = c.has_hidden ? in.hidden.data() : nullptr,
                             .weight = in.weight.data(),
                             .bias = c.centered ? in.bias.data() : nullptr,
                             .sum = out[0].data(),
                             .normed = out[1].data(),
                             .mean = c.centered ? out[2].data() : nullptr,
                             .rstd = out[3].data()};
  (c.centered ? api().layer_norm_forward : api().rms_norm_forward)(args, nullptr);
  return out;
}

NormInput reference_input(const Case& c, const Inputs& in, const Array& sum) {
  return {.rows = c.rows,
          .width = c.width,
          .centered = c.centered,
          .x = c.has_hidden ? sum.values() : in.residual.values(),
          .weight = in.weight.values(),
          .bias = c.centered ? in.bias.values() : Values{}};
}

void check_sum(const Case& c, const Inputs& in, const Array& sum) {
  if (!c.has_hidden) return;
  Values expected = in.residual.values();
  const Values hidden = in.hidden.values();
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += hidden[i];
  expect_close(sum.values(), Array(c.types.residual, expected).values(), c.types.residual, "sum");
}

// dx, d_hidden, grad_weight, grad_bias; the last two start as ones.
std::vector<Array> backward(const Case& c, const Inputs& in, const std::vector<Array>& saved) {
  std::vector<Array> out;
  out.emplace_back(c.types.residual, in.grad_residual.values(), c.shift);
  out.push_back(Array::of_size(c.types.compute, c.rows * c.width, c.shift));
  out.emplace_back(wide(c), Values(c.width, 1.0));
  out.emplace_back(wide(c), Values(c.width, 1.0));
  const auto groups = static_cast<size_t>(norm_partial_rows(static_cast<int64_t>(c.rows)));
  const Array partial = Array::of_size(wide(c), 2 * groups * c.width);
  const NormBackwardArgs args{.types = c.types,
                              .shape = shape(c),
                              .x = c.has_hidden ? saved[0].data() : in.residual.data(),
                              .mean = c.centered ? saved[2].data() : nullptr,
                              .rstd = saved[3].data(),
                              .weight = in.weight.data(),
                              .grad = in.grad.data(),
                              .grad_residual = c.has_residual_grad ? out[0].data() : nullptr,
                              .dx = out[0].data(),
                              .d_hidden = c.has_hidden ? out[1].data() : nullptr,
                              .grad_weight = out[2].data(),
                              .grad_bias = c.centered ? out[3].data() : nullptr,
                              .partial = partial.data()};
  (c.centered ? api().layer_norm_backward : api().rms_norm_backward)(args, nullptr);
  return out;
}

Values plus_one(Values values) {
  for (double& x : values) x += 1;
  return values;
}

void check_case(const Case& c) {
  SCOPED_TRACE(testing::Message() << c.rows << " x " << c.width << ", residual "
                                  << name_of(c.types.residual) << ", compute "
                                  << name_of(c.types.compute) << ", shift " << c.shift);
  const Inputs in(c);
  const auto saved = same_bits([&] { return forward(c, in); });
  check_sum(c, in, saved[0]);
  const NormInput reference = reference_input(c, in, saved[0]);
  const NormOutput expected = norm_forward(reference);
  expect_close(saved[1].values(), expected.normed, c.types.compute, "normed");
  expect_close(saved[3].values(), expected.rstd, wide(c), "rstd");
  if (c.centered) expect_close(saved[2].values(), expected.mean, wide(c), "mean");

  const auto out = same_bits([&] { return backward(c, in, saved); });
  const NormGradients grads = norm_backward(
      reference, in.grad.values(), c.has_residual_grad ? in.grad_residual.values() : Values{});
  expect_close(out[0].values(), grads.dx, c.types.residual, "dx");
  if (c.has_hidden) expect_close(out[1].values(), grads.dx, c.types.compute, "d_hidden");
  expect_close(out[2].values(), plus_one(grads.weight), wide(c), "grad_weight");
  if (c.centered) expect_close(out[3].values(), plus_one(grads.bias), wide(c), "grad_bias");
}

class RmsNorm : public KernelTest {};
TEST_F(RmsNorm, ForwardAndBackward_MatchReference) {
  for (const Case& c : cases(false)) check_case(c);
}
TEST_F(RmsNorm, ManyRows_WeightGradientSumsAllGroups) {
  check_case({{DType::kFp32, DType::kFp32, DType::kFp32}, 600, 8, false, true, true});
}
TEST_F(RmsNorm, MissingPointer_IsNamed) {
  const NormForwardArgs args{.shape = {1, 8}};
  try {
    api().rms_norm_forward(args, nullptr);
    FAIL();
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("residual is null"), std::string::npos)
        << error.what();
  }
}

class LayerNorm : public KernelTest {};
TEST_F(LayerNorm, ForwardAndBackward_MatchReference) {
  for (const Case& c : cases(true)) check_case(c);
}

}  // namespace
}  // namespace capstan::kernels::test
