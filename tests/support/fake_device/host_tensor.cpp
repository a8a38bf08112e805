// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/host_tensor.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>

#include "support/fake_device/fake_device.h"
#include "support/fake_device/memory.h"

namespace capstan::test::fake {
namespace {

void drop_reference(void* storage) { delete static_cast<c10::Storage*>(storage); }

}  // namespace

at::Tensor empty_device(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
  return at::Tensor(
      at::detail::empty_strided_generic(sizes, strides, device_allocator(), kKeys, dtype));
}

c10::Storage host_storage(const c10::Storage& device) {
  c10::DataPtr memory(host_of(device.data()), new c10::Storage(device), &drop_reference,
                      c10::Device(c10::kCPU));
  return {c10::Storage::use_byte_size_t(), device.nbytes(), std::move(memory),
          c10::GetCPUAllocator(), /*resizable=*/true};
}

at::Tensor over(const at::Tensor& shape, const c10::Storage& storage, c10::DispatchKey key) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key),
                                                   shape.dtype());
  impl->set_sizes_and_strides(shape.sizes(), shape.strides(), shape.storage_offset());
  if (shape.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return at::Tensor(std::move(impl));
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  c10::DataPtr fresh = device_allocator()->allocate(bytes);
  const size_t kept = std::min(bytes, storage.nbytes());
  if (kept > 0) device_allocator()->copy_data(fresh.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(bytes);
}

}  // namespace capstan::test::fake

namespace capstan::test {

at::Tensor host_view(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_privateuseone(), "host_view of a tensor on ", tensor.device());
  return fake::over(tensor, fake::host_storage(tensor.storage()), c10::DispatchKey::CPU);
}

void note_access(const at::Tensor& tensor, bool is_write, const char* op) {
  fake::note({{tensor, is_write}}, fake::begin_op(op));
}

void note_access(const void* device_pointer, size_t bytes, bool is_write, const char* op) {
  fake::note(device_pointer, bytes, is_write, fake::begin_op(op));
}

}  // namespace capstan::test
