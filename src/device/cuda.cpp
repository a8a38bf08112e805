// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/cuda.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <string>
#include <utility>

#include "capstan/base/error.h"
#include "capstan/base/gpu.h"
#include "capstan/device/accelerator.h"
#include "device/cuda_internal.h"

namespace capstan::device {
namespace {

[[noreturn]] void refuse(std::string got, std::string need, std::string why, std::string fix) {
  throw EnvError(ErrorText{.module = "device",
                           .what = "starting run.device cuda",
                           .got = std::move(got),
                           .need = std::move(need),
                           .why = std::move(why),
                           .fix = std::move(fix)});
}

void check_gpu(int index) {
  const GpuProbe& found = probe_gpus();
  if (!found.problem.empty())
    refuse(found.problem, "a GPU with its driver", "",
           "Set run.device: cpu, or see capstan doctor");
  const auto count = static_cast<int>(found.gpus.size());
  if (index >= count)
    refuse(fmt::format("local rank {} on a machine with {} GPUs", index, count),
           "one GPU per rank of a machine", "", "Start fewer ranks per machine");
  const Gpu& gpu = found.gpus[static_cast<size_t>(index)];
  if (!has_kernels(gpu))
    refuse(capability_text(gpu), "compute capability 8 or 9",
           "the kernels of this build are compiled for these", "Set run.device: cpu");
}

}  // namespace

void open_cuda_plugin(const std::string& path) {
  void* const plugin = ::dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!plugin) {
    const char* const text = ::dlerror();
    refuse(text ? text : path, "a plug-in that loads", "a library it needs is missing or too old",
           "Install the CUDA 13 libraries that LibTorch 2.11 names");
  }
  if (!at::detail::getCUDAHooks().hasCUDART())
    refuse("a process whose LibTorch has found no CUDA", "the plug-in before LibTorch looks for it",
           "it looks once, in the first backward or when a seed is set",
           "Call device::start_cuda before the first op");
  const auto install = reinterpret_cast<void (*)()>(::dlsym(plugin, "capstan_cuda_install"));
  if (!install)
    refuse(path + " without capstan_cuda_install", "the plug-in of this build", "",
           "Build Capstan anew");
  install();
}

void start_cuda(int index) {
  check_gpu(index);
  const std::string path = cuda_plugin_path();
  if (!has_cuda_plugin())
    refuse("no " + path, "the CUDA plug-in", "this build computes on CPUs",
           "Build with tools/setup.sh --preset cuda");
  open_cuda_plugin(path);
  accelerator()->set_device(index);
}

void compute_deterministically() {
  ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  // Else a kernel fills every new tensor, and nothing here reads one before it is written.
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

}  // namespace capstan::device
