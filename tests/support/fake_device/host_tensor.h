// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Device tensors, and CPU tensors over their memory.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

namespace capstan::test::fake {

at::Tensor empty_device(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);
// A CPU storage over a device storage's memory; grows into CPU memory when an op resizes it.
c10::Storage host_storage(const c10::Storage& device);
// Any tensor's sizes, strides, offset and dtype over another storage.
at::Tensor over(const at::Tensor& shape, const c10::Storage& storage, c10::DispatchKey key);
// Gives a device storage another size; keeps what fits.
void resize_storage(const c10::Storage& storage, size_t bytes);

}  // namespace capstan::test::fake
