// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Where kernel tests run: the host emulator (device_simt.cpp) or a GPU (device_cuda.cpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "capstan/kernels/api.h"

namespace capstan::kernels::test {

[[nodiscard]] const Api& api();
// Why tests cannot run here.
[[nodiscard]] std::optional<std::string> missing_device();
// How often a launch is repeated to see that its bits do not depend on the order of threads;
// begin_repeat sets up another order where that can be chosen.
[[nodiscard]] int repeats();
void begin_repeat(int repeat);

// Device memory on a multiple of 16 bytes. On the host an access more than 15 bytes behind the end
// stops the program, and the destructor reports writes to those 15.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&&) = delete;
  [[nodiscard]] void* data() const { return data_; }
  void write(const void* from, size_t bytes);
  void read(void* to, size_t bytes) const;  // waits for the device

 private:
  void* data_ = nullptr;
  void* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace capstan::kernels::test
