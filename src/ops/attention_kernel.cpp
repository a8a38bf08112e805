// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Calls of the attention kernels: strides, scratch, threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "ops/attention_internal.h"
#include "ops/cpu/attention_kernels.h"
#include "ops/cpu/dtypes.h"

namespace capstan::ops::attention_forms {
namespace {

cpu::HeadsView view_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// The kernels read heads as contiguous runs; anything else is copied first.
Tensor with_contiguous_heads(const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

at::ScalarType wide_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Few samples and key heads leave threads idle; then their blocks of queries are shared out.
int64_t splits_for(int64_t tasks, int64_t queries) {
  const int64_t threads = at::get_num_threads();
  const int64_t blocks = (queries + cpu::kQueryBlock - 1) / cpu::kQueryBlock;
  if (tasks >= threads || tasks == 0) return 1;
  return std::clamp<int64_t>((threads + tasks - 1) / tasks, 1, std::max<int64_t>(1, blocks));
}

cpu::AttentionArgs arguments(const Call& call, const Tensor& first_key, const Tensor& out,
                             const Tensor& lse) {
  const Tensor &q = call.q_BTNH, &k = call.k_BSKH;
  cpu::AttentionArgs args{
      .q = view_of(q), .k = view_of(k), .v = view_of(call.v_BSKH), .out = view_of(out)};
  args.lse = lse.data_ptr();
  args.samples = q.size(0);
  args.queries = q.size(1);
  args.keys = k.size(1);
  args.query_heads = q.size(2);
  args.key_heads = k.size(2);
  args.head_size = q.size(3);
  args.scale = call.scale;
  args.first_key = first_key.defined() ? first_key.const_data_ptr<int32_t>() : nullptr;
  args.window = call.mask.sliding_window.value_or(0);
  args.query_offset = call.mask.query_offset;
  args.splits = splits_for(args.samples * args.key_heads, args.queries);
  return args;
}

void run(cpu::AttentionKernels::Kernel kernel, const cpu::AttentionArgs& args, int64_t tasks,
         const Tensor& scratch) {
  char* const base = static_cast<char*>(scratch.data_ptr());
  const int64_t stride = scratch.size(1) * static_cast<int64_t>(scratch.element_size());
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, base + at::get_thread_num() * stride);
  });
}

const cpu::AttentionKernels& kernels_of(const Call& call) {
  return call.kernels ? *call.kernels : cpu::attention_kernels();
}

Tensor scratch_for(const Tensor& q, int64_t elements) {
  return at::empty({at::get_num_threads(), elements}, q.options().dtype(wide_dtype(q)));
}

Call prepared(const Call& call) {
  Call ready = call;
  ready.q_BTNH = with_contiguous_heads(call.q_BTNH);
  ready.k_BSKH = with_contiguous_heads(call.k_BSKH);
  ready.v_BSKH = with_contiguous_heads(call.v_BSKH);
  if (call.mask.first_key_BT.defined())
    ready.mask.first_key_BT = call.mask.first_key_BT.contiguous();
  return ready;
}

}  // namespace

AttentionParts kernel_forward(const Call& unprepared) {
  const Call call = prepared(unprepared);
  const Tensor& q = call.q_BTNH;
  const AttentionParts parts{
      at::empty(q.sizes(), q.options()),
      at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(wide_dtype(q)))};
  const auto args = arguments(call, call.mask.first_key_BT, parts.out_BTNH, parts.lse_BNT);
  const auto element = static_cast<size_t>(*cpu::element_of(q.scalar_type()));
  const auto& kernels = kernels_of(call);
  const Tensor scratch = scratch_for(q, kernels.sizes[element](args).forward_scratch);
  run(kernels.forward[element], args, args.samples * args.key_heads * args.splits, scratch);
  return parts;
}

void kernel_backward(const Call& unprepared, const Tensor& grad_in, const AttentionParts& parts,
                     const AttentionGrads& into) {
  const Call call = prepared(unprepared);
  const Tensor& q = call.q_BTNH;
  const Tensor grad = with_contiguous_heads(grad_in), out = with_contiguous_heads(parts.out_BTNH);
  const Tensor lse = parts.lse_BNT.contiguous();
  auto args = arguments(call, call.mask.first_key_BT, out, lse);
  args.grad = view_of(grad);
  args.dq = view_of(into.q_BTNH);
  args.dk = view_of(into.k_BSKH);
  args.dv = view_of(into.v_BSKH);
  const auto element = static_cast<size_t>(*cpu::element_of(q.scalar_type()));
  const auto& kernels = kernels_of(call);
  const auto sizes = kernels.sizes[element](args);
  const int64_t pairs = args.samples * args.key_heads, tasks = pairs * args.splits;
  const Tensor scratch = scratch_for(q, sizes.backward_scratch);
  const Tensor partial =
      args.splits > 1 ? at::empty({tasks, 2, sizes.partial_elements}, scratch.options()) : Tensor();
  if (partial.defined()) args.partial = partial.data_ptr();
  run(kernels.backward[element], args, tasks, scratch);
  if (partial.defined()) run(kernels.sum_partials[element], args, pairs, scratch);
}

}  // namespace capstan::ops::attention_forms
