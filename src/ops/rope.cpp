// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, X features of all heads, H head size.
#include "capstan/ops/rope.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <bit>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "capstan/base/check.h"
#include "capstan/ops/path.h"
#include "ops/cpu/dtypes.h"
#include "ops/cpu/rope_kernels.h"
#include "ops/on_device_internal.h"
#include "ops/rope_internal.h"

namespace capstan::ops {
namespace {

using TableKey = std::tuple<double, int64_t, at::ScalarType, at::Device>;

RopeTable make_table(double theta, int64_t head_size, int64_t length, at::ScalarType dtype,
                     at::Device device) {
  const int64_t half = head_size / 2;
  const Tensor cos = at::empty({length, half}, at::kDouble), sin = at::empty_like(cos);
  auto* const c = cos.data_ptr<double>();
  auto* const s = sin.data_ptr<double>();
  for (int64_t i = 0; i < half; ++i) {
    const double frequency =
        std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_size));
    for (int64_t t = 0; t < length; ++t) {
      c[t * half + i] = std::cos(static_cast<double>(t) * frequency);
      s[t * half + i] = std::sin(static_cast<double>(t) * frequency);
    }
  }
  return {cos.to(dtype).to(device), sin.to(dtype).to(device)};
}

bool comes_before(const TableKey& a, const TableKey& b) {
  const auto key = [](const TableKey& k) {
    const at::Device d = std::get<3>(k);
    return std::tuple(std::get<0>(k), std::get<1>(k), std::get<2>(k), d.type(), d.index());
  };
  return key(a) < key(b);
}

void rotate_reference(const Tensor& x, const RopeInput& rope, const RopeSpec& spec, bool backward) {
  const Tensor heads = x.narrow(2, 0, spec.heads * spec.head_size)
                           .view({x.size(0), x.size(1), spec.heads, spec.head_size});
  heads.copy_(turned_heads(heads.to(rope.table.cos.scalar_type()), rope, backward));
}

void rotate_on_device(const Tensor& x, const RopeInput& rope, const RopeSpec& spec, bool backward) {
  const auto& [positions, table] = rope;
  device_kernels()->rope(
      {.dtype = *on_device::dtype_of(x),
       .x = x.mutable_data_ptr(),
       .rows = x.size(0) * x.size(1),
       .row_stride = x.size(2),
       .heads = spec.heads,
       .head_size = spec.head_size,
       .cos = table.cos.const_data_ptr(),
       .sin = table.sin.const_data_ptr(),
       .positions = positions.defined() ? positions.const_data_ptr<int64_t>() : nullptr,
       .rows_per_sample = x.size(1),
       .backward = backward},
      on_device::stream());
}

void rotate(const Tensor& x, const RopeInput& rope, const RopeSpec& spec, bool backward) {
  at::NoGradGuard no_grad;
  const Path form = path_of(x);
  if (form == Path::kDevice) return rotate_on_device(x, rope, spec, backward);
  const auto element = cpu::element_of(x.scalar_type());
  if (form == Path::kReference || !element) return rotate_reference(x, rope, spec, backward);
  const auto& [positions, table] = rope;
  const cpu::RopeArgs args{
      .x = x.mutable_data_ptr(),
      .row_stride = x.size(2),
      .heads = spec.heads,
      .head_size = spec.head_size,
      .cos = table.cos.const_data_ptr(),
      .sin = table.sin.const_data_ptr(),
      .positions = positions.defined() ? positions.const_data_ptr<int64_t>() : nullptr,
      .rows_per_sample = x.size(1),
      .backward = backward};
  const auto kernel = cpu::rope_kernels().rotate[static_cast<size_t>(*element)];
  at::parallel_for(0, x.size(0) * x.size(1), cpu::grain(spec.heads * spec.head_size),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// How long the table must be. Positions come from the data, so they are checked before they index
// memory.
int64_t length_needed(const Tensor& positions, int64_t tokens, const RopeSpec& spec) {
  if (!positions.defined()) return tokens;
  if (positions.numel() == 0) return 1;
  if (!positions.is_cpu()) {  // reading them would wait for the device
    CAPSTAN_CHECK(spec.length > 0, "rope: positions on {} need the length of a row",
                  positions.device().str());
    return spec.length;
  }
  const auto* const p = positions.const_data_ptr<int64_t>();
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < positions.numel(); ++i) {
    low = std::min(low, p[i]);
    high = std::max(high, p[i]);
  }
  CAPSTAN_CHECK(low >= 0, "rope: position {} is negative", low);
  return high + 1;
}

}  // namespace

RopeTable rope_table(double theta, int64_t head_size, int64_t length, at::ScalarType dtype,
                     at::Device device) {
  static std::mutex mutex;
  static auto& tables = *new std::map<TableKey, RopeTable, decltype(&comes_before)>(&comes_before);
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const std::scoped_lock lock(mutex);
  RopeTable& table = tables[{theta, head_size, wide, device}];
  if (!table.cos.defined() || table.cos.size(0) < length) {
    const bool growing = table.cos.defined();
    const auto rounded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(length)));
    table = make_table(theta, head_size, growing ? rounded : length, wide, device);
  }
  return table;
}

RopeInput check_rope(const Tensor& x, const Tensor& positions_in, const RopeSpec& spec) {
  CAPSTAN_CHECK(x.dim() == 3 && x.is_contiguous(), "rope: need a contiguous [B, T, X] tensor");
  CAPSTAN_CHECK(spec.head_size > 0 && spec.head_size % 2 == 0, "rope: head size {} is not even",
                spec.head_size);
  CAPSTAN_CHECK(spec.heads * spec.head_size <= x.size(2), "rope: {} heads of {} in {} features",
                spec.heads, spec.head_size, x.size(2));
  CAPSTAN_CHECK(!positions_in.defined() || positions_in.numel() == x.size(0) * x.size(1),
                "rope: {} positions for {} tokens", positions_in.numel(), x.size(0) * x.size(1));
  const Tensor positions =
      positions_in.defined() ? positions_in.to(at::kLong).contiguous().view({x.size(0), x.size(1)})
                             : Tensor();
  return {positions,
          rope_table(spec.theta, spec.head_size, length_needed(positions, x.size(1), spec),
                     x.scalar_type(), x.device())};
}

Tensor turned_heads(const Tensor& heads, const RopeInput& rope, bool backward) {
  const int64_t half = heads.size(3) / 2;
  const Tensor index =
      rope.positions_BT.defined()
          ? rope.positions_BT
          : at::arange(heads.size(1), heads.options().dtype(at::kLong)).unsqueeze(0);
  const Tensor cos = rope.table.cos.index({index}).unsqueeze(2);  // B T 1 H/2
  const Tensor sin = rope.table.sin.index({index}).unsqueeze(2) * (backward ? -1 : 1);
  const Tensor a = heads.narrow(-1, 0, half), b = heads.narrow(-1, half, half);
  return at::cat({a * cos - b * sin, b * cos + a * sin}, -1);
}

Tensor rope(const Tensor& x, const Tensor& positions, const RopeSpec& spec) {
  const RopeInput input = check_rope(x, positions, spec);
  const Tensor out = x.detach();
  const Path chosen = path();
  rotate(out, input, spec, false);
  return record(
      out, {"rope", {x}, {}, {}, [input, spec, chosen](const Tensors&, Tensors& grads) -> Tensors {
              const PathGuard guard(chosen);
              const Tensor grad = own_or_copy(std::move(grads[0]));
              rotate(grad, input, spec, true);
              return {grad};
            }});
}

}  // namespace capstan::ops
