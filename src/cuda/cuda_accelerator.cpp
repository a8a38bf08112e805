// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "cuda/cuda_accelerator.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/cuda/MemPool.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "capstan/base/error.h"
#include "capstan/base/log.h"

namespace capstan::cuda {
namespace {

void check(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  throw EnvError(ErrorText{.module = "cuda",
                           .what = fmt::format("calling {}", call),
                           .got = cudaGetErrorString(result),
                           .need = "success",
                           .why = "an earlier kernel may have failed: errors arrive late",
                           .fix = "Run again with CUDA_LAUNCH_BLOCKING=1 to see which"});
}

// Of the end of things, which may be that of a run whose device has failed: the failure that is on
// its way to the user stays the one.
bool is_still_well(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return true;
  log::debug("cuda", "calling {} at the end: {}", call, cudaGetErrorString(result));
  return false;
}

cudaStream_t raw(device::Stream stream) { return static_cast<cudaStream_t>(stream.handle); }
cudaEvent_t raw(device::Event event) { return static_cast<cudaEvent_t>(event.handle); }
at::cuda::MemPool* raw(device::Pool pool) { return static_cast<at::cuda::MemPool*>(pool.handle); }

c10::cuda::CUDAStream wrapped(device::Stream stream, c10::DeviceIndex index) {
  if (!stream.handle) return c10::cuda::getDefaultCUDAStream(index);
  return c10::cuda::getStreamFromExternal(raw(stream), index);
}

}  // namespace

int CudaAccelerator::device_count() const { return c10::cuda::device_count(); }

void CudaAccelerator::set_device(int index) {
  if (device_count() == 0)
    throw EnvError(ErrorText{.module = "cuda",
                             .what = "choosing a GPU",
                             .got = "none that the CUDA runtime can use",
                             .need = "a driver for CUDA 13.0 and its GPU",
                             .why = "the driver lists GPUs, the runtime refuses them",
                             .fix = "Update the driver, or set run.device: cpu"});
  if (index < 0 || index >= device_count())
    throw EnvError(ErrorText{.module = "cuda",
                             .what = "choosing a GPU",
                             .got = fmt::format("number {}", index),
                             .need = fmt::format("0 to {}", device_count() - 1),
                             .why = "that is what CUDA shows this process",
                             .fix = "Start fewer ranks per machine, or see CUDA_VISIBLE_DEVICES"});
  index_ = static_cast<c10::DeviceIndex>(index);
  c10::cuda::set_device(index_);
  // Else the first tensor does it, and pools and statistics are refused before.
  at::globalContext().lazyInitDevice(type());
}

device::Stream CudaAccelerator::current_stream() const {
  return {c10::cuda::getCurrentCUDAStream(index_).stream()};
}

void CudaAccelerator::set_current_stream(device::Stream stream) {
  c10::cuda::setCurrentCUDAStream(wrapped(stream, index_));
}

device::Stream CudaAccelerator::create_stream(bool high_priority) {
  int lowest = 0, highest = 0;
  check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
  cudaStream_t made = nullptr;
  check(
      cudaStreamCreateWithPriority(&made, cudaStreamNonBlocking, high_priority ? highest : lowest),
      "cudaStreamCreateWithPriority");
  return {made};
}

void CudaAccelerator::synchronize(device::Stream stream) {
  check(cudaStreamSynchronize(raw(stream)), "cudaStreamSynchronize");
}

device::Event CudaAccelerator::create_event() {
  cudaEvent_t made = nullptr;
  check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return {made};
}

void CudaAccelerator::destroy(device::Event event) {
  (void)is_still_well(cudaEventDestroy(raw(event)), "cudaEventDestroy");
}

void CudaAccelerator::record(device::Event event, device::Stream stream) {
  check(cudaEventRecord(raw(event), raw(stream)), "cudaEventRecord");
}

void CudaAccelerator::wait(device::Stream stream, device::Event event) {
  check(cudaStreamWaitEvent(raw(stream), raw(event), 0), "cudaStreamWaitEvent");
}

bool CudaAccelerator::is_done(device::Event event) const {
  const cudaError_t result = cudaEventQuery(raw(event));
  if (result == cudaErrorNotReady) {
    (void)cudaGetLastError();  // no error, and not one of the next kernel that asks
    return false;
  }
  check(result, "cudaEventQuery");
  return true;
}

void CudaAccelerator::synchronize(device::Event event) {
  check(cudaEventSynchronize(raw(event)), "cudaEventSynchronize");
}

// Calls of other threads (a prefetch that allocates pinned memory, the watch over NCCL) do not
// disturb the capture.
void CudaAccelerator::begin_capture(device::Pool pool) {
  capturing_ = std::make_unique<at::cuda::CUDAGraph>();
  capturing_->capture_begin(raw(pool)->id(), cudaStreamCaptureModeThreadLocal);
}

device::Graph CudaAccelerator::end_capture() {
  auto made = std::move(capturing_);
  made->capture_end();
  return {made.release()};
}

bool CudaAccelerator::is_capturing() const {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

void CudaAccelerator::launch(device::Graph graph) {
  static_cast<at::cuda::CUDAGraph*>(graph.handle)->replay();
}

void CudaAccelerator::destroy(device::Graph graph) {
  delete static_cast<at::cuda::CUDAGraph*>(graph.handle);
}

device::Pool CudaAccelerator::create_pool() { return {new at::cuda::MemPool}; }
// LibTorch's destructor ends the program when the device has failed.
void CudaAccelerator::destroy(device::Pool pool) {
  if (is_still_well(cudaDeviceSynchronize(), "cudaDeviceSynchronize")) delete raw(pool);
}

void CudaAccelerator::begin_allocating(device::Pool pool) {
  const auto is_here = [here = raw(current_stream())](cudaStream_t stream) {
    return stream == here;
  };
  c10::cuda::CUDACachingAllocator::beginAllocateToPool(index_, raw(pool)->id(), is_here);
}

// Each begin counts as a user of the pool.
void CudaAccelerator::end_allocating(device::Pool pool) {
  c10::cuda::CUDACachingAllocator::endAllocateToPool(index_, raw(pool)->id());
  c10::cuda::CUDACachingAllocator::releasePool(index_, raw(pool)->id());
}

void CudaAccelerator::keep_for(const at::Tensor& tensor, device::Stream stream) {
  c10::cuda::CUDACachingAllocator::recordStream(tensor.storage().data_ptr(),
                                                wrapped(stream, index_));
}

at::Tensor CudaAccelerator::empty_pinned(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, at::TensorOptions().dtype(dtype).pinned_memory(true));
}

device::DeviceMemory CudaAccelerator::memory() const {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(index_);
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return {.free_bytes = static_cast<int64_t>(free),
          .total_bytes = static_cast<int64_t>(total),
          .allocated_bytes = stats.allocated_bytes[kAll].current,
          .peak_bytes = stats.allocated_bytes[kAll].peak,
          .reserved_bytes = stats.reserved_bytes[kAll].current,
          .peak_reserved_bytes = stats.reserved_bytes[kAll].peak};
}

void CudaAccelerator::reset_peak() { c10::cuda::CUDACachingAllocator::resetPeakStats(index_); }

bool CudaAccelerator::has_grouped_products(at::ScalarType type) const {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_),
        "cudaDeviceGetAttribute");
  return type == at::kBFloat16 && major == 9;
}

}  // namespace capstan::cuda
