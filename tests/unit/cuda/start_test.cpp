// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The plug-in opened by processes of their own, without a GPU: LibTorch has to learn of CUDA from
// it before it looks.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "capstan/base/error.h"
#include "capstan/comm/nccl.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/ops/lt_api.h"
#include "device/cuda_internal.h"

namespace capstan::device {
namespace {

[[noreturn]] void open_and_exit(const char* path) {
  try {
    open_cuda_plugin(path);
  } catch (const EnvError& error) {
    std::fputs(error.what(), stderr);
    std::_Exit(1);
  }
  const bool has_all = accelerator() && ops::device_kernels() && ops::installed_lt_api() &&
                       comm::installed_nccl_api();
  std::_Exit(has_all ? 0 : 2);
}

// What keeps LibTorch's CUDA half from loading on this machine, asked by another process.
std::string missing_library() {
  std::array<int, 2> ends{};
  if (::pipe(ends.data()) != 0) return "no pipe";
  const pid_t child = ::fork();
  if (child == 0) {
    if (!::dlopen(CAPSTAN_TEST_TORCH_CUDA, RTLD_NOW | RTLD_GLOBAL))
      ::dprintf(ends[1], "%s", ::dlerror());
    std::_Exit(0);
  }
  ::close(ends[1]);
  std::string text;
  std::array<char, 256> piece{};
  for (ssize_t n = 0; (n = ::read(ends[0], piece.data(), piece.size())) > 0;)
    text.append(piece.data(), static_cast<size_t>(n));
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  return text;
}

// A build without a GPU needs LibTorch's libraries to link and not what they need to load.
class StartCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    static const std::string missing = missing_library();
    if (!missing.empty()) GTEST_SKIP() << "LibTorch's CUDA libraries are not here: " << missing;
  }
};

TEST_F(StartCuda, ThePluginInstallsAllItHas) {
  EXPECT_EXIT(open_and_exit(CAPSTAN_TEST_PLUGIN), ::testing::ExitedWithCode(0), "");
}

TEST_F(StartCuda, PlainOpsMayComeFirst) {
  const auto start = [] {
    (void)at::mm(at::ones({4, 4}), at::ones({4, 4}));
    open_and_exit(CAPSTAN_TEST_PLUGIN);
  };
  EXPECT_EXIT(start(), ::testing::ExitedWithCode(0), "");
}

TEST_F(StartCuda, ABackwardBeforeItIsRefused) {
  const auto start = [] {
    const at::Tensor x = at::ones({2}).set_requires_grad(true);
    x.mul(2).sum().backward();
    open_and_exit(CAPSTAN_TEST_PLUGIN);
  };
  EXPECT_EXIT(start(), ::testing::ExitedWithCode(1), "start_cuda before the first op");
}

TEST(StartCudaFromElsewhere, AnotherLibraryIsRefused) {
  EXPECT_EXIT(open_and_exit("/nonexistent.so"), ::testing::ExitedWithCode(1), "nonexistent");
}

}  // namespace
}  // namespace capstan::device
