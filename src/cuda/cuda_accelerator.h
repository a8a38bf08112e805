// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// device::Accelerator over the CUDA runtime and LibTorch's streams and caching allocator. A
// device::Stream's handle is a cudaStream_t, an Event's a cudaEvent_t.
#pragma once
#include <ATen/cuda/CUDAGraph.h>

#include <memory>

#include "capstan/device/accelerator.h"

namespace capstan::cuda {

class CudaAccelerator final : public device::Accelerator {
 public:
  [[nodiscard]] const char* name() const override { return "cuda"; }
  [[nodiscard]] c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  [[nodiscard]] int device_count() const override;
  void set_device(int index) override;
  [[nodiscard]] c10::Device device() const override { return {type(), index_}; }

  [[nodiscard]] device::Stream current_stream() const override;
  void set_current_stream(device::Stream stream) override;
  [[nodiscard]] device::Stream create_stream(bool high_priority) override;
  void synchronize(device::Stream stream) override;

  [[nodiscard]] device::Event create_event() override;
  void destroy(device::Event event) override;
  void record(device::Event event, device::Stream stream) override;
  void wait(device::Stream stream, device::Event event) override;
  [[nodiscard]] bool is_done(device::Event event) const override;
  void synchronize(device::Event event) override;

  void begin_capture(device::Pool pool) override;
  [[nodiscard]] device::Graph end_capture() override;
  [[nodiscard]] bool is_capturing() const override;
  void launch(device::Graph graph) override;
  void destroy(device::Graph graph) override;
  [[nodiscard]] device::Pool create_pool() override;
  void destroy(device::Pool pool) override;
  void begin_allocating(device::Pool pool) override;
  void end_allocating(device::Pool pool) override;

  void keep_for(const at::Tensor& tensor, device::Stream stream) override;
  [[nodiscard]] at::Tensor empty_pinned(at::IntArrayRef sizes, at::ScalarType dtype) override;
  [[nodiscard]] device::DeviceMemory memory() const override;
  void reset_peak() override;
  [[nodiscard]] bool has_grouped_products(at::ScalarType type) const override;

 private:
  c10::DeviceIndex index_ = 0;
  std::unique_ptr<at::cuda::CUDAGraph> capturing_;
};

}  // namespace capstan::cuda
