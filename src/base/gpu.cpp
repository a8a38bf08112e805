// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/gpu.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <type_traits>

namespace capstan {
namespace {

// Of the driver API, whose binary interface is stable (cuda.h).
using Result = int;
using Device = int;
constexpr Result kSuccess = 0, kNoDevice = 100;
enum Attribute { kMultiprocessors = 16, kMajor = 75, kMinor = 76 };

struct Driver {
  Result (*init)(unsigned flags) = nullptr;
  Result (*version)(int* version) = nullptr;
  Result (*count)(int* count) = nullptr;
  Result (*get)(Device* device, int ordinal) = nullptr;
  Result (*name)(char* name, int length, Device device) = nullptr;
  Result (*memory)(size_t* bytes, Device device) = nullptr;
  Result (*attribute)(int* value, int attribute, Device device) = nullptr;
  Result (*error)(Result result, const char** text) = nullptr;

  // Returns the name of what the library lacks, or nullptr.
  const char* open(void* library) {
    const char* missing = nullptr;
    const auto find = [&](auto& function, const char* symbol) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, symbol));
      if (!function) missing = symbol;
    };
    find(init, "cuInit");
    find(version, "cuDriverGetVersion");
    find(count, "cuDeviceGetCount");
    find(get, "cuDeviceGet");
    find(name, "cuDeviceGetName");
    find(memory, "cuDeviceTotalMem_v2");
    find(attribute, "cuDeviceGetAttribute");
    find(error, "cuGetErrorString");
    return missing;
  }

  [[nodiscard]] std::string text_of(Result result) const {
    const char* text = nullptr;
    if (error(result, &text) != kSuccess || !text) return fmt::format("error {}", result);
    return text;
  }
};

Gpu describe(const Driver& driver, int ordinal) {
  Gpu gpu;
  Device device = 0;
  if (driver.get(&device, ordinal) != kSuccess) return gpu;
  std::array<char, 256> name{};
  if (driver.name(name.data(), static_cast<int>(name.size()), device) == kSuccess)
    gpu.name = name.data();
  size_t bytes = 0;
  if (driver.memory(&bytes, device) == kSuccess) gpu.memory_bytes = static_cast<int64_t>(bytes);
  (void)driver.attribute(&gpu.multiprocessors, kMultiprocessors, device);
  (void)driver.attribute(&gpu.major, kMajor, device);
  (void)driver.attribute(&gpu.minor, kMinor, device);
  return gpu;
}

GpuProbe probe() {
  GpuProbe found;
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    found.problem = "no NVIDIA driver (libcuda.so.1 is not there)";
    return found;
  }
  Driver driver;
  if (const char* const missing = driver.open(library)) {
    found.problem = fmt::format("the NVIDIA driver's library has no {}", missing);
    return found;
  }
  (void)driver.version(&found.driver_cuda);
  int count = 0;
  Result result = driver.init(0);
  if (result == kSuccess) result = driver.count(&count);
  if (result != kSuccess && result != kNoDevice) {
    found.problem = "the NVIDIA driver does not start: " + driver.text_of(result);
    return found;
  }
  for (int i = 0; i < count; ++i) found.gpus.push_back(describe(driver, i));
  if (count == 0) found.problem = "the NVIDIA driver shows no GPU (see CUDA_VISIBLE_DEVICES)";
  return found;
}

}  // namespace

std::string capability_text(const Gpu& gpu) {
  return fmt::format("{} of compute capability {}.{}", gpu.name, gpu.major, gpu.minor);
}

std::optional<double> dense_flops(const std::string& gpu_name, DType dtype) {
  struct Entry {
    const char* part;  // of the name; the first that fits counts
    double narrow, fp32, fp64;
  };
  // NVIDIA data sheets of H200, H100 and A100; fp32 without tensor cores.
  static constexpr Entry kTable[] = {{"H200", 989e12, 67e12, 67e12},
                                     {"H100 NVL", 835e12, 60e12, 60e12},
                                     {"H100 PCIe", 756e12, 51e12, 51e12},
                                     {"H100", 989e12, 67e12, 67e12},
                                     {"A100", 312e12, 19.5e12, 19.5e12}};
  for (const Entry& entry : kTable) {
    if (gpu_name.find(entry.part) == std::string::npos) continue;
    if (dtype == DType::kBf16 || dtype == DType::kFp16) return entry.narrow;
    if (dtype == DType::kFp32) return entry.fp32;
    if (dtype == DType::kFp64) return entry.fp64;
  }
  return std::nullopt;
}

const GpuProbe& probe_gpus() {
  static const GpuProbe found = probe();
  return found;
}

std::string cuda_plugin_path() {
  Dl_info here{};
  ::dladdr(reinterpret_cast<const void*>(&cuda_plugin_path), &here);
  std::error_code ignored;
  const auto library = std::filesystem::canonical(here.dli_fname ? here.dli_fname : "", ignored);
  return (library.parent_path() / "libcapstan_cuda.so").string();
}

bool has_cuda_plugin() { return ::access(cuda_plugin_path().c_str(), R_OK) == 0; }

std::string gpu_obstacle(int ranks) {
  const GpuProbe& found = probe_gpus();
  const auto count = static_cast<int>(found.gpus.size());
  if (count == 0) return found.problem;
  if (!has_cuda_plugin())
    return fmt::format("no {}: this build computes on CPUs", cuda_plugin_path());
  if (found.driver_cuda < kNeededCuda)
    return fmt::format("the NVIDIA driver runs CUDA up to {}, need {}",
                       cuda_version_text(found.driver_cuda), cuda_version_text(kNeededCuda));
  if (count < ranks)
    return fmt::format("{} ranks here, and CUDA shows {} of this host's GPUs", ranks, count);
  for (int i = 0; i < ranks; ++i)
    if (const Gpu& gpu = found.gpus[static_cast<size_t>(i)]; !has_kernels(gpu))
      return fmt::format("GPU {}, {}, and kernels of this build are for 8.x and 9.x", i,
                         capability_text(gpu));
  return "";
}

std::string cuda_version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

}  // namespace capstan
