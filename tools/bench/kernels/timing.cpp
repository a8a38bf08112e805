// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "timing.h"

#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>

#include "capstan/base/error.h"
#include "capstan/kernels/api.h"

namespace capstan::bench {
namespace {

constexpr int kWarmUps = 3, kRepeats = 21;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw EnvError(ErrorText{.module = "bench",
                             .what = what,
                             .got = cudaGetErrorString(error),
                             .need = {},
                             .why = {},
                             .fix = {}});
}

}  // namespace

const kernels::Api& api() { return kernels::cuda_api(); }

DeviceMemory::DeviceMemory(size_t bytes) {
  check(cudaMalloc(&data_, bytes), "allocating device memory");
  check(cudaMemset(data_, 0, bytes), "clearing device memory");
}
DeviceMemory::~DeviceMemory() { cudaFree(data_); }
void DeviceMemory::write(const void* from, size_t bytes) {
  check(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "copying to the device");
}

double median_us(const std::function<void(kernels::Stream)>& run) {
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "creating an event");
  check(cudaEventCreate(&end), "creating an event");
  for (int i = 0; i < kWarmUps; ++i) run(nullptr);
  std::vector<double> times;
  for (int i = 0; i < kRepeats; ++i) {
    check(cudaEventRecord(begin, nullptr), "recording an event");
    run(nullptr);
    check(cudaEventRecord(end, nullptr), "recording an event");
    check(cudaEventSynchronize(end), "waiting for a kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "reading a time");
    times.push_back(ms * 1e3);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return times[kRepeats / 2];
}

std::string device_name() {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "finding a CUDA device");
  return properties.name;
}

double copy_rate() {
  static const double rate = [] {
    constexpr int64_t kBytes = int64_t{1} << 30;
    const DeviceMemory from(kBytes), to(kBytes);
    const double us = median_us([&](kernels::Stream stream) {
      api().copy({from.data(), to.data(), kBytes}, stream);
    });
    return 2.0 * static_cast<double>(kBytes) / us * 1e6;
  }();
  return rate;
}

void report(const std::string& kernel, const std::string& shape, double bytes, double us) {
  const double rate = bytes / us * 1e6;
  fmt::print("{:<24}{:<44}{:>10.1f}{:>10.0f}{:>8.2f}\n", kernel, shape, us, rate / 1e9,
             rate / copy_rate());
}

}  // namespace capstan::bench
