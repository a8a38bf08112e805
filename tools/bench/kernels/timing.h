// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Times a kernel on the device and compares the bytes that it must move with a device copy. A test
// puts the emulator behind it, which tells no times.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "capstan/kernels/api.h"

namespace capstan::bench {

[[nodiscard]] const kernels::Api& api();

// Zeroed device memory; freed at the end.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes);
  template <class T>
  explicit DeviceMemory(const std::vector<T>& values) : DeviceMemory(values.size() * sizeof(T)) {
    write(values.data(), values.size() * sizeof(T));
  }
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  [[nodiscard]] void* data() const { return data_; }
  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void write(const void* from, size_t bytes);
  void* data_ = nullptr;
};

// Median of repeated launches, in microseconds.
[[nodiscard]] double median_us(const std::function<void(kernels::Stream)>& run);
[[nodiscard]] std::string device_name();  // throws EnvError without a device

// Bytes per second of kernels::copy on 1 GiB, read and write counted.
[[nodiscard]] double copy_rate();
// One line: kernel (of Api), shape, us, GB/s, ratio to the copy.
void report(const std::string& kernel, const std::string& shape, double bytes, double us);

}  // namespace capstan::bench
