// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, N = B T, V local vocabulary rows, D hidden features.
#include "capstan/ops/embedding.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/ops/path.h"
#include "ops/cpu/dtypes.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

// Columns that one task adds: tasks share no element, so the order of additions does not depend on
// the threads.
constexpr int64_t kColumnsPerTask = 64;

struct Rows {
  int64_t begin = 0, count = 0;  // global rows held here, padding excluded
};

Rows rows_of(const Param& table) {
  const plan::Box& real = table.local().real;
  return {real.begin.at(0), real.extent.at(0)};
}

// Off the CPU the caller has looked: reading them would wait for the device.
void check_ids(const Tensor& ids, int64_t vocab) {
  if (!ids.is_cpu()) return;
  const auto* const id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    if (id[i] < 0 || id[i] >= vocab)
      throw DataError(ErrorText{.module = "ops",
                                .what = fmt::format("looking up token {} of the batch", i),
                                .got = fmt::format("id {}", id[i]),
                                .need = fmt::format("0 to {}", vocab - 1),
                                .why = "the model's vocabulary ends there",
                                .fix = "Prepare the data with the tokenizer of this model"});
}

// The 16-bit types convert to each other through float only.
template <class To, class From>
To to_type(From x) {
  if constexpr (sizeof(From) == 2)
    return static_cast<To>(static_cast<float>(x));
  else
    return static_cast<To>(x);
}

template <class From, class To>
void gather_rows(const Tensor& table, const Tensor& ids, Rows rows, const Tensor& out) {
  const int64_t width = table.size(1);
  const auto* const from = table.const_data_ptr<From>();
  const auto* const id = ids.const_data_ptr<int64_t>();
  auto* const to = out.mutable_data_ptr<To>();
  at::parallel_for(0, ids.numel(), cpu::grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = id[i] - rows.begin;
      const bool here = row >= 0 && row < rows.count;
      To* const target = to + i * width;
      const From* const source = from + (here ? row : 0) * width;
      for (int64_t d = 0; d < width; ++d) target[d] = here ? to_type<To>(source[d]) : To(0);
    }
  });
}

template <class From, class To>
void scatter_rows(const Tensor& grad, const Tensor& ids, Rows rows, const Tensor& buffer) {
  const int64_t width = buffer.size(1);
  const auto* const from = grad.const_data_ptr<From>();
  const auto* const id = ids.const_data_ptr<int64_t>();
  auto* const to = buffer.mutable_data_ptr<To>();
  const int64_t tasks = (width + kColumnsPerTask - 1) / kColumnsPerTask;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumnsPerTask, last = std::min(width, end * kColumnsPerTask);
    for (int64_t i = 0; i < ids.numel(); ++i) {
      const int64_t row = id[i] - rows.begin;
      if (row < 0 || row >= rows.count) continue;
      const From* const source = from + i * width;
      To* const target = to + row * width;
#pragma omp simd
      for (int64_t d = first; d < last; ++d) target[d] += to_type<To>(source[d]);
    }
  });
}

// Calls visit(From{}, To{}) with the C++ types of two float dtypes.
template <class Visit>
void with_types(at::ScalarType from, at::ScalarType to, const Visit& visit) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, from, "embedding", [&] {
    using From = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, to, "embedding",
                                    [&] { visit(From{}, scalar_t{}); });
  });
}

// The same by ATen, for other devices. Rows that are not here are row 0 times zero.
struct LocalRows {
  Tensor row_N, here_N1;
  LocalRows(const Tensor& ids, Rows rows) {
    const Tensor row = ids.reshape({-1}) - rows.begin;
    const Tensor here = (row >= 0).logical_and(row < rows.count);
    row_N = row * here;
    here_N1 = here.unsqueeze(1);
  }
};

Tensor gather_by_aten(const Tensor& table, const Tensor& ids, Rows rows, at::ScalarType residual) {
  const LocalRows local(ids, rows);
  std::vector<int64_t> sizes = ids.sizes().vec();
  sizes.push_back(table.size(1));
  return (table.index_select(0, local.row_N).to(residual) * local.here_N1).view(sizes);
}

void scatter_by_aten(const Tensor& grad, const Tensor& ids, Rows rows, const Tensor& buffer) {
  const LocalRows local(ids, rows);
  const Tensor grad_ND = grad.reshape({-1, grad.size(-1)}).to(buffer.scalar_type());
  buffer.index_add_(0, local.row_N, grad_ND * local.here_N1);
}

kernels::EmbeddingShape device_shape(const Tensor& ids, Rows rows, int64_t width) {
  return {.tokens = ids.numel(), .width = width, .first_row = rows.begin, .rows = rows.count};
}

Tensor gather_on_device(const Tensor& table, const Tensor& ids, Rows rows,
                        at::ScalarType residual) {
  std::vector<int64_t> sizes = ids.sizes().vec();
  sizes.push_back(table.size(1));
  const Tensor out = at::empty(sizes, table.options().dtype(residual));
  device_kernels()->embedding_forward({.table_dtype = *on_device::dtype_of(table),
                                       .out_dtype = *on_device::dtype_of(residual),
                                       .shape = device_shape(ids, rows, table.size(1)),
                                       .table = table.const_data_ptr(),
                                       .ids = ids.const_data_ptr<int64_t>(),
                                       .out = out.mutable_data_ptr()},
                                      on_device::stream());
  return out;
}

void scatter_on_device(const Tensor& grad, const Tensor& ids, Rows rows, const Tensor& buffer) {
  const auto shape = device_shape(ids, rows, buffer.size(1));
  const auto bytes = static_cast<int64_t>(device_kernels()->embedding_workspace_bytes(shape));
  const Tensor workspace = at::empty({bytes}, buffer.options().dtype(at::kByte));
  device_kernels()->embedding_backward({.grad_dtype = *on_device::dtype_of(grad),
                                        .buffer_dtype = *on_device::dtype_of(buffer),
                                        .shape = shape,
                                        .grad = grad.const_data_ptr(),
                                        .ids = ids.const_data_ptr<int64_t>(),
                                        .buffer = buffer.mutable_data_ptr(),
                                        .workspace = workspace.mutable_data_ptr()},
                                       on_device::stream());
}

void add_rows(param::GradSlot& slot, const Tensor& grad, const Tensor& ids, Rows rows) {
  if (slot.overwrite) slot.buffer.zero_();
  slot.overwrite = false;
  const Path form = path_of(slot.buffer);
  if (form == Path::kDevice) return scatter_on_device(grad, ids, rows, slot.buffer);
  if (!grad.is_cpu()) return scatter_by_aten(grad, ids, rows, slot.buffer);
  CAPSTAN_CHECK(slot.buffer.is_contiguous(), "embedding: gradient buffer is not contiguous");
  with_types(grad.scalar_type(), slot.buffer.scalar_type(), [&](auto from, auto to) {
    scatter_rows<decltype(from), decltype(to)>(grad, ids, rows, slot.buffer);
  });
}

Tensor look_up(const Tensor& ids, const Tensor& weight_VD, Rows rows, at::ScalarType residual) {
  at::NoGradGuard no_grad;
  if (path_of(weight_VD) == Path::kDevice && on_device::dtype_of(residual))
    return gather_on_device(weight_VD, ids, rows, residual);
  if (!weight_VD.is_cpu()) return gather_by_aten(weight_VD, ids, rows, residual);
  std::vector<int64_t> sizes = ids.sizes().vec();
  sizes.push_back(weight_VD.size(1));
  const Tensor out = at::empty(sizes, weight_VD.options().dtype(residual));
  with_types(weight_VD.scalar_type(), residual, [&](auto from, auto to) {
    gather_rows<decltype(from), decltype(to)>(weight_VD, ids, rows, out);
  });
  return out;
}

}  // namespace

Tensor embedding(const Tensor& ids_BT, const Param& table, at::ScalarType residual) {
  CAPSTAN_CHECK(ids_BT.scalar_type() == at::kLong, "embedding: ids must be int64");
  const Rows rows = rows_of(table);
  const Tensor ids = ids_BT.contiguous();
  check_ids(ids, table.spec().shape.at(0));
  const Tensor out = look_up(ids, table.value().contiguous(), rows, residual);
  return record(
      out,
      {"embedding", {}, {table}, {}, [table, ids, rows](const Tensors&, Tensors& grads) -> Tensors {
         const Tensor grad = grads[0].contiguous();
         table.accumulate(
             [grad, ids, rows](param::GradSlot& slot) { add_rows(slot, grad, ids, rows); });
         return {};
       }});
}

}  // namespace capstan::ops
