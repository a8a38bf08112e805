// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/natives.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "support/fake_device/capture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fallback.h"
#include "support/fake_device/host_copies.h"
#include "support/fake_device/host_tensor.h"
#include "support/fake_device/memory.h"

namespace capstan::test::fake {
namespace {

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;
using Format = std::optional<at::MemoryFormat>;

at::Tensor empty(at::IntArrayRef sizes, Dtype dtype, Layout, Device, std::optional<bool>,
                 Format format) {
  constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
  return at::Tensor(at::detail::empty_generic(sizes, device_allocator(), kKeys,
                                              c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, Dtype dtype, Layout,
                         Device, std::optional<bool>) {
  return empty_device(sizes, strides, c10::dtype_or_default(dtype));
}

// CUDA takes the way over a pageable CPU tensor when types differ or the host's has gaps.
bool is_asynchronous(const at::Tensor& host, const at::Tensor& device) {
  return is_pinned(host.storage().data()) && host.is_contiguous() &&
         host.scalar_type() == device.scalar_type();
}

void copy_to_device(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const Access now = begin_op("copy to the device");
  note({{to, true}}, now);
  arrive_for(from, now.stream);
  host_view(to).copy_(from);
  if (!non_blocking)
    synchronize_stream(now.stream, now.op);
  else if (is_asynchronous(from, to))
    hold_source(from, now);
  else
    count_host_sync("unpinned copy to the device");  // the driver stages pageable memory
}

void copy_to_host(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  // Another thread's wait must not pass this op before its copy is among those under way.
  const std::lock_guard lock(state_mutex());
  const Access now = begin_op("copy to the host");
  note({{from, false}}, now);
  if (non_blocking && is_asynchronous(to, from)) {
    const at::Tensor value = at::empty_like(to);
    value.copy_(host_view(from));
    arrive_later(to, value, now);
    return;
  }
  to.copy_(host_view(from));
  synchronize_stream(now.stream, now.op);
}

void copy_on_device(const at::Tensor& from, const at::Tensor& to) {
  const Access now = begin_op("copy");
  note({{from, false}, {to, true}}, now);
  host_view(to).copy_(host_view(from));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& to, bool non_blocking) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  if (is_capturing())
    record_for_graph([from = unowned(source), onto = unowned(to), non_blocking] {
      (void)copy_from(from, onto, non_blocking);
    });
  const at::Tensor from = source.sizes() == to.sizes() ? source : source.expand(to.sizes());
  if (from.is_cpu())
    copy_to_device(from, to, non_blocking);
  else if (to.is_cpu())
    copy_to_host(from, to, non_blocking);
  else
    copy_on_device(from, to);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Access now = begin_op("item");
  note({{tensor, false}}, now);
  const at::Scalar value = at::_local_scalar_dense(host_view(tensor));
  synchronize_stream(now.stream, now.op);
  return value;
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef sizes, Format format) {
  const size_t bytes = at::detail::computeStorageNbytesContiguous(
      sizes, self.itemsize(), static_cast<size_t>(self.storage_offset()));
  if (bytes > self.storage().nbytes()) resize_storage(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  if (format && *format != at::MemoryFormat::Preserve)
    self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

at::Tensor& set_strided(at::Tensor& self, at::Storage storage, int64_t offset,
                        at::IntArrayRef sizes, at::IntArrayRef strides) {
  at::native::checkSetStorage<int64_t>(self, std::move(storage), offset, sizes, strides);
  auto* const impl = self.unsafeGetTensorImpl();
  if (strides.data()) {
    impl->set_sizes_and_strides(sizes, strides, offset);
  } else {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(sizes);
  }
  const size_t bytes = at::detail::computeStorageNbytes(sizes, self.strides(), self.itemsize(),
                                                        static_cast<size_t>(offset));
  if (self.numel() > 0 && bytes > self.storage().nbytes()) resize_storage(self.storage(), bytes);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_strided(self, std::move(storage), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_strided(self, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_tensor(self, empty_device({0}, {1}, self.scalar_type()));
}

void record_stream(at::Tensor& self, at::Stream stream) {
  keep_for(self.storage().data(), static_cast<int>(stream.id()));
}

// The CPU's answer would name a kernel that only CPU tensors reach.
int64_t sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  constexpr int64_t kMath = 0;
  return kMath;
}

// What CUDA asks of the factors of an fp8 product (Blas.cpp): rows of the first and columns of the
// second lie together, sides are multiples of 16, one of them is e4m3, scales are one number each
// or one per row and column; those give bf16.
void check_scaled_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                     const at::Tensor& scale_b, const at::Tensor& out) {
  constexpr int64_t kSide = 16;
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.stride(1) == 1 &&
                  b.stride(0) == 1 && a.stride(0) >= a.size(1) && b.stride(1) >= b.size(0),
              "_scaled_mm: the first factor by rows, the second by columns");
  TORCH_CHECK(a.size(1) % kSide == 0 && b.size(1) % kSide == 0, "_scaled_mm: sides of ", a.sizes(),
              " and ", b.sizes());
  TORCH_CHECK(
      a.element_size() == 1 && b.element_size() == 1 && b.scalar_type() == at::kFloat8_e4m3fn,
      "_scaled_mm: factors of ", a.scalar_type(), " and ", b.scalar_type());
  TORCH_CHECK(scale_a.scalar_type() == at::kFloat && scale_b.scalar_type() == at::kFloat,
              "_scaled_mm: scales are fp32");
  const bool by_tensor = scale_a.numel() == 1 && scale_b.numel() == 1;
  const bool by_row = scale_a.sizes() == at::IntArrayRef({a.size(0), 1}) &&
                      scale_b.sizes() == at::IntArrayRef({1, b.size(1)}) &&
                      scale_a.is_contiguous() && scale_b.is_contiguous();
  TORCH_CHECK(by_tensor || by_row, "_scaled_mm: scales of ", scale_a.sizes(), " and ",
              scale_b.sizes());
  TORCH_CHECK(by_tensor || out.scalar_type() == at::kBFloat16, "_scaled_mm: by rows gives bf16");
}

void check_scaled_bias(const std::optional<at::Tensor>& bias, const at::Tensor& out) {
  TORCH_CHECK(
      !bias || (bias->is_contiguous() && bias->numel() == out.size(1) &&
                bias->scalar_type() == out.scalar_type() && out.scalar_type() != at::kFloat),
      "_scaled_mm: a bias of other columns or type than the result, or on fp32");
}

// Summed in fp64 and rounded once.
at::Tensor& scaled_mm_out(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                          const at::Tensor& scale_b, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& scale_result, Dtype out_dtype, bool,
                          at::Tensor& out) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  TORCH_CHECK(!scale_result && out_dtype == out.scalar_type(), "_scaled_mm: not imitated");
  check_scaled_mm(a, b, scale_a, scale_b, out);
  check_scaled_bias(bias, out);
  if (is_capturing())
    record_for_graph([a = unowned(a), b = unowned(b), scale_a = unowned(scale_a),
                      scale_b = unowned(scale_b),
                      bias = bias ? std::optional(unowned(*bias)) : std::nullopt, out_dtype,
                      out = unowned(out)]() mutable {
      scaled_mm_out(a, b, scale_a, scale_b, bias, {}, out_dtype, false, out);
    });
  const Access now = begin_op("_scaled_mm");
  note({{a, false}, {b, false}, {scale_a, false}, {scale_b, false}, {out, true}}, now);
  const auto wide = [](const at::Tensor& x) { return host_view(x).to(at::kDouble); };
  at::Tensor product = at::mm(wide(a) * wide(scale_a), wide(b) * wide(scale_b));
  if (bias) {
    note({{*bias, false}}, now);
    product.add_(wide(*bias));
  }
  host_view(out).copy_(product);
  return out;
}

bool has_kernel(const c10::OperatorName& name, c10::DispatchKey key) {
  const auto op = c10::Dispatcher::singleton().findOp(name);
  return op && op->hasSchema() && op->hasKernelForDispatchKey(key);
}

// LibTorch prefers an op's composite form to a backend's fallback. Where the CPU has a kernel of
// its own beside that form, it is run, so that results have the CPU's bits.
void prefer_kernels(torch::Library& aten) {
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.starts_with("aten::") && has_kernel(name, c10::DispatchKey::CPU) &&
        (has_kernel(name, c10::DispatchKey::CompositeImplicitAutograd) ||
         has_kernel(name, c10::DispatchKey::CompositeExplicitAutograd)) &&
        !has_kernel(name, c10::DispatchKey::PrivateUse1))
      aten.impl(toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

}  // namespace

void register_ops() {
  static torch::Library all(torch::Library::IMPL, "_", c10::DispatchKey::PrivateUse1, __FILE__,
                            __LINE__);
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  static torch::Library aten(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__,
                             __LINE__);
  aten.impl("empty.memory_format", &empty);
  aten.impl("empty_strided", &empty_strided);
  aten.impl("as_strided", &at::native::as_strided_tensorimpl);
  aten.impl("view", &at::native::view);
  aten.impl("_reshape_alias", &at::native::_reshape_alias);
  aten.impl("unfold", &at::native::unfold);
  aten.impl("_copy_from", &copy_from);
  aten.impl("_copy_from_and_resize", &copy_from_and_resize);
  aten.impl("_local_scalar_dense", &local_scalar);
  aten.impl("resize_", &resize);
  aten.impl("set_", &set_nothing);
  aten.impl("set_.source_Tensor", &set_tensor);
  aten.impl("set_.source_Storage", &set_storage);
  aten.impl("set_.source_Storage_storage_offset", &set_strided);
  aten.impl("record_stream", &record_stream);
  aten.impl("_fused_sdp_choice", &sdp_choice);
  aten.impl("_scaled_mm.out", &scaled_mm_out);
  // A backend without a kernel of its own counts as one without the op.
  for (const char* name :
       {"_flash_attention_forward", "_flash_attention_backward", "_efficient_attention_forward",
        "_efficient_attention_backward", "_grouped_mm"})
    aten.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  prefer_kernels(aten);
}

}  // namespace capstan::test::fake
