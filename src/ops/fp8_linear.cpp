// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/fp8_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"

namespace capstan::ops {

Fp8Linear::Fp8Linear(Fp8Options options) : options_(std::move(options)) {
  if (!is_delayed()) return;
  const auto count = static_cast<int64_t>(options_.projections.size());
  for (int64_t i = 0; i < count; ++i) rows_[options_.projections[static_cast<size_t>(i)]] = i;
  const auto real = at::TensorOptions().device(options_.device).dtype(at::kFloat);
  maxima_P2_ = at::zeros({count, 2}, real);
  history_HP2_ = at::zeros({options_.history, count, 2}, real);
  expected_P2_ = at::zeros({count, 2}, real);
  holds_history_ = at::zeros({}, real.dtype(at::kBool));
}

bool Fp8Linear::covers(const Projection& projection) {
  return !projection.parts.front().spec().wide;
}

Fp8Format Fp8Linear::format_of(Role role) const {
  return role == kInput ? Fp8Format::kE4m3 : options_.gradients;
}

Fp8Matrix Fp8Linear::cast(const Tensor& x, Fp8Format format, bool transposed) const {
  if (options_.scaling != Fp8Scaling::kRow)
    return quantise(x, format, largest_size(x), {.transposed = transposed});
  return quantise_rows(transposed ? x.t().contiguous() : x, format);
}

Fp8Matrix Fp8Linear::cast(const Tensor& x, const Projection& projection, Role role, bool transposed,
                          bool observes) const {
  if (!is_delayed()) return cast(x, format_of(role), transposed);
  const auto row = rows_.find(projection.parts.front().spec().name);
  CAPSTAN_CHECK(row != rows_.end(), "fp8: {} has no history", projection.parts.front().spec().name);
  const auto place = [&](const Tensor& table_P2) {
    return table_P2.select(0, row->second).narrow(0, role, 1);
  };
  return quantise(x, format_of(role), expected_largest(x, place(expected_P2_)),
                  {.transposed = transposed, .observed = observes ? place(maxima_P2_) : Tensor()});
}

Tensor Fp8Linear::expected_largest(const Tensor& x, const Tensor& expected_1) const {
  if (has_history_) return expected_1;
  const Tensor own_1 = largest_size(x);
  return options_.device.is_cpu() ? own_1 : at::where(holds_history_, expected_1, own_1);
}

Fp8Matrix Fp8Linear::weight(const Projection& projection, bool turned) {
  if (!options_.keeps_weights) return cast(projection.weight(), Fp8Format::kE4m3, turned);
  const Param& first = projection.parts.front();
  Kept& kept = kept_[{first.store(), first.index()}];
  std::vector<uint64_t> versions;
  for (const Param& part : projection.parts) versions.push_back(part.version());
  if (kept.versions != versions) kept = {std::move(versions), {}, {}};
  std::optional<Fp8Matrix>& made = turned ? kept.turned_DO : kept.forward_OD;
  if (!made) made = cast(projection.weight(), Fp8Format::kE4m3, turned);
  return *made;
}

void Fp8Linear::forward(const Tensor& out_NO, const Tensor& x_ND, const Projection& projection,
                        const Tensor& bias_O, bool observes) {
  const at::NoGradGuard no_grad;
  multiply_into(out_NO, cast(x_ND, projection, kInput, false, observes), weight(projection, false),
                bias_O);
}

void Fp8Linear::input_gradient(const Tensor& out_ND, const Tensor& grad_NO,
                               const Projection& projection) {
  const at::NoGradGuard no_grad;
  multiply_into(out_ND, cast(grad_NO, projection, kGradient, false, true),
                weight(projection, true));
}

// What was observed on the way to dx is observed again, which changes no maximum: a first layer
// has no dx.
void Fp8Linear::add_weight_gradient(param::GradSlot& slot, const Tensor& grad_NO,
                                    const Tensor& x_ND, const Projection& projection) {
  const at::NoGradGuard no_grad;
  const Fp8Matrix grad_ON = cast(grad_NO, projection, kGradient, true, true);
  const Fp8Matrix x_DN = cast(x_ND, projection, kInput, true, false);
  if (multiply_wide(slot.buffer, grad_ON, x_DN, !slot.overwrite)) {
    slot.overwrite = false;
    return;
  }
  const Tensor product_OD = at::empty({grad_NO.size(1), x_ND.size(1)}, grad_NO.options());
  multiply_into(product_OD, grad_ON, x_DN);
  param::add_to_slot(slot, product_OD);
}

void Fp8Linear::finish_step(bool applied) {
  if (!is_delayed()) return;
  const at::NoGradGuard no_grad;
  if (applied) {
    const int64_t older = options_.history - 1;
    if (older > 0) history_HP2_.narrow(0, 1, older).copy_(history_HP2_.narrow(0, 0, older).clone());
    history_HP2_.select(0, 0).copy_(maxima_P2_);
    expected_P2_.copy_(history_HP2_.amax(0));
    holds_history_.fill_(true);
    has_history_ = true;
  }
  maxima_P2_.zero_();
}

void Fp8Linear::finish_step_on_device(const Tensor& skip) {
  if (!is_delayed()) return;
  const at::NoGradGuard no_grad;
  const Tensor applied = skip.eq(0);
  const Tensor older = history_HP2_.narrow(0, 0, options_.history - 1);
  const Tensor moved_HP2 = at::cat({maxima_P2_.unsqueeze(0), older});
  history_HP2_.copy_(at::where(applied, moved_HP2, history_HP2_));
  expected_P2_.copy_(history_HP2_.amax(0));
  holds_history_.logical_or_(applied);
  maxima_P2_.zero_();
}

void Fp8Linear::refresh() {
  if (!is_delayed()) return;
  const at::NoGradGuard no_grad;
  expected_P2_.copy_(history_HP2_.amax(0));
  has_history_ = expected_P2_.gt(0).any().item<bool>();
  holds_history_.fill_(has_history_);
}

}  // namespace capstan::ops
