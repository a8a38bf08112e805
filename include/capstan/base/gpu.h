// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The GPUs of this machine as the NVIDIA driver tells of them, found without CUDA and without
// LibTorch: the driver's library is opened when first asked.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "capstan/base/dtype.h"

namespace capstan {

struct Gpu {
  std::string name;          // "NVIDIA H100 80GB HBM3"
  int64_t memory_bytes = 0;  // of the device
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
};

// Whether this build's kernels run there: they are compiled for compute capability 8.0 and 9.0a.
[[nodiscard]] inline bool has_kernels(const Gpu& gpu) { return gpu.major == 8 || gpu.major == 9; }
// "NVIDIA T4 of compute capability 7.5"
[[nodiscard]] std::string capability_text(const Gpu& gpu);

// Dense matrix products per second by the data sheet, tensor cores for fp16 and bf16, without
// sparsity; none for GPUs and types that the table lacks. The denominator of MFU.
[[nodiscard]] std::optional<double> dense_flops(const std::string& gpu_name, DType dtype);

inline constexpr int kNeededCuda = 13000;  // of the driver: what LibTorch's CUDA half is made for

struct GpuProbe {
  std::vector<Gpu> gpus;  // those that CUDA_VISIBLE_DEVICES leaves
  int driver_cuda = 0;    // newest CUDA the driver runs: 13000 for 13.0; 0 without a driver
  std::string problem;    // why there are none, empty otherwise
};

// Looks once per process. Never throws. Thread-safe.
[[nodiscard]] const GpuProbe& probe_gpus();
// libcapstan_cuda.so beside this library: what a run on GPUs opens. The file may be absent.
[[nodiscard]] std::string cuda_plugin_path();
[[nodiscard]] bool has_cuda_plugin();
// Why so many ranks of this machine cannot have a usable GPU each; empty where they can.
[[nodiscard]] std::string gpu_obstacle(int ranks);
// "13.0"
[[nodiscard]] std::string cuda_version_text(int version);

}  // namespace capstan
