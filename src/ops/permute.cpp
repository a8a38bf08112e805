// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: N tokens, k choices of a token, E experts, R rows, D features.
#include "capstan/ops/permute.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/ops/path.h"
#include "ops/experts_on_device_internal.h"

namespace capstan::ops {
namespace {

int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

at::ScalarType wide_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// sum[n] = sum over j of weight[n, j] x rows[place[n, j]], in the order of j.
template <class T>
void sum_rows(const Tensor& rows_RD, const Tensor& weights_Nk, const Tensor& place_Nk,
              const Tensor& sum_ND) {
  using Wide = at::opmath_type<T>;
  const int64_t width = rows_RD.size(1), k = place_Nk.size(1);
  const T* const rows = rows_RD.const_data_ptr<T>();
  const Wide* const weights = weights_Nk.defined() ? weights_Nk.const_data_ptr<Wide>() : nullptr;
  const int64_t* const place = place_Nk.const_data_ptr<int64_t>();
  T* const out = sum_ND.mutable_data_ptr<T>();
  at::parallel_for(0, place_Nk.size(0), grain(k * width), [&](int64_t begin, int64_t end) {
    std::vector<Wide> sum(static_cast<size_t>(width));
    Wide* const s = sum.data();
    for (int64_t n = begin; n < end; ++n) {
      std::fill(sum.begin(), sum.end(), Wide(0));
      for (int64_t j = n * k; j < (n + 1) * k; ++j) {
        if (place[j] < 0) continue;
        const Wide w = weights ? weights[j] : Wide(1);
        const T* const row = rows + place[j] * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) s[d] += w * static_cast<Wide>(row[d]);
      }
      T* const to = out + n * width;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(s[d]);
    }
  });
}

Tensor sum_reference(const Tensor& rows_RD, const Tensor& weights_Nk, const Tensor& place_Nk) {
  const auto wide = wide_dtype(rows_RD);
  Tensor sum_ND = at::zeros({place_Nk.size(0), rows_RD.size(1)}, rows_RD.options().dtype(wide));
  if (rows_RD.size(0) == 0) return sum_ND.to(rows_RD.scalar_type());
  for (int64_t j = 0; j < place_Nk.size(1); ++j) {
    const Tensor place_N = place_Nk.select(1, j), is_kept_N1 = place_N.ge(0).unsqueeze(-1);
    Tensor part_ND = rows_RD.index_select(0, place_N.clamp_min(0)).to(wide) * is_kept_N1;
    if (weights_Nk.defined()) part_ND = part_ND * weights_Nk.select(1, j).unsqueeze(-1);
    sum_ND.add_(part_ND);
  }
  return sum_ND.to(rows_RD.scalar_type());
}

Tensor sum_of_rows(const Tensor& rows_in, const Tensor& weights_Nk, const Tensor& place_Nk,
                   Path form) {
  if (form == Path::kReference) return sum_reference(rows_in, weights_Nk, place_Nk);
  if (form == Path::kDevice) return on_device::sum_of_rows(rows_in, weights_Nk, place_Nk);
  const Tensor rows_RD = rows_in.contiguous();
  const Tensor weights = weights_Nk.defined() ? weights_Nk.contiguous() : weights_Nk;
  const Tensor sum_ND = at::empty({place_Nk.size(0), rows_RD.size(1)}, rows_RD.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows_RD.scalar_type(), "sum_rows",
                                  [&] { sum_rows<scalar_t>(rows_RD, weights, place_Nk, sum_ND); });
  return sum_ND;
}

// Gradients of combine_rows: row r = weight of its slot x gradient of its token; weight of a slot =
// gradient of its token . row.
template <class T>
void split_rows(const Tensor& grad_ND, const Tensor& rows_RD, const Tensor& weights_Nk,
                const Tensor& slot_R, const Tensor& drows_RD, const Tensor& dweights_Nk) {
  using Wide = at::opmath_type<T>;
  const int64_t width = rows_RD.size(1), k = weights_Nk.size(1);
  const T* const grad = grad_ND.const_data_ptr<T>();
  const T* const rows = rows_RD.const_data_ptr<T>();
  const Wide* const weights = weights_Nk.const_data_ptr<Wide>();
  const int64_t* const slot = slot_R.const_data_ptr<int64_t>();
  T* const drows = drows_RD.mutable_data_ptr<T>();
  Wide* const dweights = dweights_Nk.mutable_data_ptr<Wide>();
  at::parallel_for(0, slot_R.numel(), grain(2 * width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* const g = grad + slot[r] / k * width;
      const T* const y = rows + r * width;
      T* const dy = drows + r * width;
      const Wide w = weights[slot[r]];
      Wide dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < width; ++d) {
        const Wide gd = static_cast<Wide>(g[d]);
        dot += gd * static_cast<Wide>(y[d]);
        dy[d] = static_cast<T>(w * gd);
      }
      dweights[slot[r]] = dot;
    }
  });
}

Tensors split_reference(const Tensor& grad_ND, const Tensor& rows_RD, const Tensor& weights_Nk,
                        const Tensor& slot_R) {
  const auto wide = wide_dtype(rows_RD);
  const Tensor grad_RD =
      grad_ND.index_select(0, at::floor_divide(slot_R, weights_Nk.size(1))).to(wide);
  const Tensor weight_R1 = weights_Nk.reshape({-1}).index_select(0, slot_R).unsqueeze(-1);
  const Tensor dweights_Nk = at::zeros_like(weights_Nk);
  dweights_Nk.view(-1).index_copy_(0, slot_R, (grad_RD * rows_RD.to(wide)).sum(-1));
  return {(grad_RD * weight_R1).to(rows_RD.scalar_type()), dweights_Nk};
}

Tensors split_gradients(const Tensor& grad_in, const Tensor& rows_in, const Tensor& weights_in,
                        const ExpertOrder& order, Path form) {
  if (form == Path::kDevice) return on_device::split_gradients(grad_in, rows_in, weights_in, order);
  const Tensor slot_R = order.slot_R;
  if (form == Path::kReference) return split_reference(grad_in, rows_in, weights_in, slot_R);
  const Tensor grad_ND = grad_in.contiguous(), rows_RD = rows_in.contiguous();
  const Tensor weights_Nk = weights_in.contiguous();
  const Tensor drows_RD = at::empty_like(rows_RD), dweights_Nk = at::zeros_like(weights_Nk);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rows_RD.scalar_type(), "split_rows",
      [&] { split_rows<scalar_t>(grad_ND, rows_RD, weights_Nk, slot_R, drows_RD, dweights_Nk); });
  return {drows_RD, dweights_Nk};
}

// Forms other than the kernels' read the slots of all rows.
void check_form(const ExpertOrder& order, Path form) {
  CAPSTAN_CHECK(form == Path::kDevice || !order.ends_E.defined(),
                "an order whose rows only the device knows, for rows that our kernels do not move");
}

// Choices are integers, so path_of() does not know them.
bool has_kernel(const Tensor& experts_Nk, int64_t experts) {
  return !experts_Nk.is_cpu() && path() != Path::kReference && device_kernels() != nullptr &&
         on_device::takes_order(experts_Nk.numel(), experts);
}

}  // namespace

ExpertOrder order_by_expert(const Tensor& experts_in, const Tensor& keep_in, int64_t experts,
                            bool on_device) {
  if (has_kernel(experts_in, experts))
    return on_device::order_by_expert(experts_in, keep_in, experts, on_device);
  CAPSTAN_CHECK(!on_device, "no kernel orders choices among {} experts", experts);
  const Tensor experts_Nk = experts_in.cpu().contiguous();
  const Tensor keep_Nk = keep_in.defined() ? keep_in.cpu().contiguous() : keep_in;
  const auto* const chosen = experts_Nk.const_data_ptr<int64_t>();
  const bool* const keep = keep_Nk.defined() ? keep_Nk.const_data_ptr<bool>() : nullptr;
  ExpertOrder order;
  order.counts_E.assign(static_cast<size_t>(experts), 0);
  for (int64_t slot = 0; slot < experts_Nk.numel(); ++slot) {
    CAPSTAN_CHECK(chosen[slot] >= 0 && chosen[slot] < experts, "expert {} of {}", chosen[slot],
                  experts);
    if (!keep || keep[slot]) ++order.counts_E[static_cast<size_t>(chosen[slot])];
  }
  std::vector<int64_t> next;  // row of the next token of each expert
  int64_t rows = 0;
  for (const int64_t count : order.counts_E) {
    next.push_back(rows);
    rows += count;
  }
  order.slot_R = at::empty({rows}, at::kLong);
  order.place_Nk = at::empty(experts_Nk.sizes(), at::kLong);
  auto* const slots = order.slot_R.mutable_data_ptr<int64_t>();
  auto* const place = order.place_Nk.mutable_data_ptr<int64_t>();
  for (int64_t slot = 0; slot < experts_Nk.numel(); ++slot) {
    place[slot] = -1;
    if (keep && !keep[slot]) continue;
    place[slot] = next[static_cast<size_t>(chosen[slot])]++;
    slots[place[slot]] = slot;
  }
  order.slot_R = order.slot_R.to(experts_in.device());
  order.place_Nk = order.place_Nk.to(experts_in.device());
  return order;
}

ExpertOrder with_room(const ExpertOrder& order, const Tensor& experts_Nk, int64_t room) {
  CAPSTAN_CHECK(order.ends_E.defined(), "room for rows that the host has counted");
  const int64_t experts = order.ends_E.numel();
  const auto longs = order.place_Nk.options();
  // How far the rows of each expert move.
  Tensor shift_E = at::arange(experts, longs) * room;
  shift_E.narrow(0, 1, experts - 1).sub_(order.ends_E.narrow(0, 0, experts - 1));
  const Tensor moved_Nk =
      order.place_Nk + shift_E.index_select(0, experts_Nk.flatten()).view_as(order.place_Nk);
  ExpertOrder spread = order;
  spread.place_Nk = at::where(order.place_Nk.lt(0), order.place_Nk, moved_Nk);
  spread.ends_E = at::arange(1, experts + 1, longs.dtype(at::kInt)) * room;
  spread.padded_rows = experts * room;
  return spread;
}

Tensor permute_tokens(const Tensor& x_ND, const ExpertOrder& order) {
  const Path form = path_of(x_ND);
  const int64_t k = order.place_Nk.size(1);
  check_form(order, form);
  CAPSTAN_CHECK(x_ND.dim() == 2 && x_ND.size(0) == order.place_Nk.size(0),
                "permute: {} tokens for an order of {}", x_ND.size(0), order.place_Nk.size(0));
  Tensor rows_RD;
  {
    at::NoGradGuard no_grad;
    rows_RD = form == Path::kDevice ? on_device::permute_tokens(x_ND, order)
                                    : x_ND.index_select(0, at::floor_divide(order.slot_R, k));
  }
  const Tensor place_Nk = order.place_Nk;
  return record(rows_RD, {"permute_tokens",
                          {x_ND},
                          {},
                          {},
                          [place_Nk, form](const Tensors&, Tensors& grads) -> Tensors {
                            at::NoGradGuard no_grad;
                            return {sum_of_rows(grads[0], {}, place_Nk, form)};
                          }});
}

Tensor combine_rows(const Tensor& y_RD, const Tensor& weights_in, const ExpertOrder& order) {
  const Path form = path_of(y_RD);
  check_form(order, form);
  const int64_t rows = order.padded_rows > 0 ? order.padded_rows : order.slot_R.numel();
  CAPSTAN_CHECK(
      y_RD.dim() == 2 && y_RD.size(0) == rows && weights_in.sizes() == order.place_Nk.sizes(),
      "combine: {} rows for an order of {}", y_RD.size(0), rows);
  CAPSTAN_CHECK(weights_in.scalar_type() == wide_dtype(y_RD),
                "combine: weights of {} for rows of {}", c10::toString(weights_in.scalar_type()),
                c10::toString(y_RD.scalar_type()));
  Tensor sum_ND;
  {
    at::NoGradGuard no_grad;
    sum_ND = sum_of_rows(y_RD, weights_in, order.place_Nk, form);
  }
  return record(sum_ND, {"combine_rows",
                         {y_RD, weights_in},
                         {},
                         {y_RD, weights_in},
                         [order, form](const Tensors& saved, Tensors& grads) {
                           at::NoGradGuard no_grad;
                           return split_gradients(grads[0], saved[0], saved[1], order, form);
                         }});
}

}  // namespace capstan::ops
