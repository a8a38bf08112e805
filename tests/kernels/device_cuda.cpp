// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <utility>

#include "kernels/device.h"

namespace capstan::kernels::test {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

const Api& api() { return cuda_api(); }

std::optional<std::string> missing_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(error);
  if (count == 0) return "no CUDA device";
  return std::nullopt;
}

int repeats() { return 2; }
void begin_repeat(int) {}

Memory::Memory(size_t bytes) : bytes_(bytes) {
  check(cudaMalloc(&base_, bytes + 1), "cudaMalloc");
  data_ = base_;
}
Memory::~Memory() {
  if (base_) cudaFree(base_);
}
Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      base_(std::exchange(other.base_, nullptr)),
      bytes_(other.bytes_) {}

void Memory::write(const void* from, size_t bytes) {
  check(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
void Memory::read(void* to, size_t bytes) const {
  check(cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}

}  // namespace capstan::kernels::test
